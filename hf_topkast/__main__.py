"""`python -m hf_topkast`, and `accelerate launch -m hf_topkast train CONFIG`: the command line."""

from .cli import main


if __name__ == "__main__":
    main()

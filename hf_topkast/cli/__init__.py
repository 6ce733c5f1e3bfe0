"""The command line, `hf-topkast`: a file for each verb, which imports what is slow to import only when it runs."""

from .app import main


__all__ = ["main"]

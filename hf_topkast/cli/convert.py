"""`hf-topkast densify` and `export`: a checkpoint in another form."""

from pathlib import Path
from typing import Annotated

import typer

from ..headers import STATE_NAME
from .checkpoint import open_checkpoint
from .output import AsJson, mebibytes, print_json, print_lines, waiting


Source = Annotated[str, typer.Argument(metavar="IN", help="A sparse checkpoint: a directory, or a name on the hub.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]


def densify(checkpoint: Source, output: Target, as_json: AsJson = False):
    """
    Write a checkpoint as an ordinary dense one, with nothing of ours in it.

    It computes the same function; what the sets were is lost, so that training cannot be resumed from it.

    Examples:

        hf-topkast densify runs/demo dense-demo
    """
    _check(checkpoint, output)
    from ..surgery import densify as make_dense

    with waiting(f"Loading {checkpoint}"):
        make_dense(_load(checkpoint)).save_pretrained(output)
        _copy_tokenizer(checkpoint, output)
    _report(checkpoint, output, as_json)


def export(checkpoint: Source, output: Target, as_json: AsJson = False):
    """
    Write a checkpoint in the compact form, which from_pretrained reads after `import hf_topkast`.

    For inference and for a new training: of each sparse layer one bit per weight and the weights of A, no more.

    Examples:

        hf-topkast export runs/demo small-demo
    """
    _check(checkpoint, output)
    from ..checkpoints import export_sparse

    with waiting(f"Loading {checkpoint}"):
        export_sparse(_load(checkpoint), output)
        _copy_tokenizer(checkpoint, output)
    _report(checkpoint, output, as_json)


def _check(checkpoint: str, output: Path):
    """Looks at what needs no weights, before torch is imported and a model is built."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: give another directory, or delete it first.")
    if open_checkpoint(checkpoint).state is None:
        raise ValueError(f"{checkpoint} is dense already: no {STATE_NAME} lies beside its weights.")


def _load(checkpoint: str):
    """The model, of the class that wrote the checkpoint: another one would lack its head, and get a new one."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    from .. import checkpoints  # noqa: F401 (lets from_pretrained know sparse layers)

    disable_progress_bar()
    written_by = transformers.AutoConfig.from_pretrained(checkpoint).architectures or ["AutoModelForCausalLM"]
    kind = getattr(transformers, written_by[0], None)
    if kind is None:
        raise ValueError(
            f"{checkpoint} is a {written_by[0]}, which transformers does not have. Load it in Python with that class, "
            "and call hf_topkast.densify(model) and save_pretrained, or export_sparse(model, directory)."
        )
    return kind.from_pretrained(checkpoint)


def _copy_tokenizer(checkpoint: str, output: Path):
    """So that the new directory can be used as the old one, if that has a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError):  # none: a model of other people's making, or of no text
        return
    if tokenizer.vocab_size:  # else made up from config.json, with no file of its own
        tokenizer.save_pretrained(output)


def _report(checkpoint: str, output: Path, as_json: bool):
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        print_json({"input": checkpoint, "output": str(output), "bytes": size})
    else:
        print_lines(f"wrote {output}, {mebibytes(size)} MiB")

"""`hf-topkast`: its verbs, and what becomes of errors."""

import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from .calibrate import calibrate
from .compare import compare
from .convert import densify, export
from .doctor import doctor
from .inspect import inspect
from .plot import plot
from .report import report
from .train import train


app = typer.Typer(
    name="hf-topkast",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel="Checkpoints")(inspect)
app.command(rich_help_panel="Checkpoints")(compare)
app.command(rich_help_panel="Checkpoints")(densify)
app.command(rich_help_panel="Checkpoints")(export)
app.command(rich_help_panel="Training", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    train
)
app.command(rich_help_panel="Training")(report)
app.command(rich_help_panel="Training")(plot)
app.command(rich_help_panel="This machine")(doctor)
app.command(rich_help_panel="This machine")(calibrate)

# Set by --traceback, for who looks for a mistake of ours.
_settings = {"traceback": False}


@app.callback(invoke_without_command=True)
def every(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error comes from.")
    ] = False,
):
    """Truly sparse training: look at checkpoints and runs, convert, train, and measure this machine."""
    _settings["traceback"] = traceback
    if version:
        from .. import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(argv: list[str] | None = None):
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): the words after `hf-topkast`; those of the process by default.

    Raises:
        SystemExit: with 2 for bad input, said in one line on the error stream.
    """
    try:
        code = app(sys.argv[1:] if argv is None else argv, prog_name="hf-topkast", standalone_mode=False)
    except TyperException as error:
        _stop(error.format_message())
    except Abort:
        sys.exit(1)
    except (ValueError, ImportError, OSError) as error:  # bad input: what the package raises says what to do
        if _settings["traceback"]:
            raise
        _stop(str(error))
    if isinstance(code, int) and code:
        sys.exit(code)


def _stop(message: str):
    print(f"hf-topkast: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

"""What a training left in its directory, read without torch, and a page that shows it."""

from .page import write_page
from .read import Run, read_run


__all__ = ["Run", "read_run", "write_page"]

"""What a training left in its directory, read without torch, and a page that shows it."""

from .page import write_page
from .read import Run, named_apart, read_run


__all__ = ["Run", "named_apart", "read_run", "write_page"]

"""The examples run on the stand-ins that the code blocks of the docs run on."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

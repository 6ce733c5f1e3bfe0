"""Tests of the docs import the hooks of the site's build, as the build does: by folder."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "hooks"))

"""Tests of the docs import hooks of the site's build, and parts of the recipes, as those do: by folder."""

import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "hooks"), str(ROOT / "recipes")]

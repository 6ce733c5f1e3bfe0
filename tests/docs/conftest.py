"""Tests of the docs import the hooks of the site's build, as the build does, and the recipes, as they do: by folder."""

import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "hooks"), str(ROOT / "recipes")]

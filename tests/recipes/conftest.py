"""Tests of the recipes: they import the modules the way `accelerate launch recipes/run_clm.py` does, by folder."""

import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: no test may need the network

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

"""The numbers that the demo's file promises are those of a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "enwik8" / "demo.yaml"


@pytest.mark.slow
def test_the_demo_reaches_what_its_file_says(tmp_path):
    """Other processors add up in another order, and other releases of Python have other sources: near it, that is."""
    promised = re.search(r"Reached ([\d.]+) \(valid\) and ([\d.]+) \(test\) bits per byte", DEMO.read_text())
    command = [sys.executable, "recipes/run_clm.py", str(DEMO), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([*command, "--disable_tqdm", "true"], cwd=ROOT, env=environment, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    for name, value in zip(("valid", "test"), promised.groups()):
        assert results[f"{name}_bits_per_byte"] == pytest.approx(float(value), abs=0.05), name

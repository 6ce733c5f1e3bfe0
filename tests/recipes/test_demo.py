"""The numbers that the demo's file promises are those of a run: of a short one, so that tests have time for it."""

import json
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
    steps, *promised = re.search(
        r"--max_steps (\d+), .*\n# reaches ([\d.]+) \(valid\) and ([\d.]+) \(test\)", DEMO.read_text()
    ).groups()
    command = [sys.executable, "recipes/run_clm.py", str(DEMO), "--output_dir", str(tmp_path), "--max_steps", steps]
    command += ["--use_cpu", "true", "--disable_tqdm", "true"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    for name, value in zip(("valid", "test"), promised):
        assert results[f"{name}_bits_per_byte"] == pytest.approx(float(value), abs=0.05), name

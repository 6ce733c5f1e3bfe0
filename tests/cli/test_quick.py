"""That a quick answer does not wait for torch, and that the package is itself all the same."""

import json
import subprocess
import sys

import pytest


def loaded(code, *argv):
    """Which of some slow modules a process has imported in the end."""
    told = "; import sys, json; print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    start = f"import sys; sys.argv = {['/usr/bin/hf-topkast', *map(str, argv)]!r}; "
    done = subprocess.run([sys.executable, "-c", start + code + told], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["sparse", "compact", "dense"])
def test_inspect_imports_no_torch(checkpoints, form):
    code = "from hf_topkast.cli import main; main()"
    assert loaded(code, "inspect", checkpoints[1] / form) == []


def test_neither_do_lists_reports_and_comparisons(checkpoints, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    code = "from hf_topkast.cli import main; main()"
    assert loaded(code, "train", "--list") == []
    assert loaded(code, "report", tmp_path, "--output", tmp_path / "page.html") == []
    assert loaded(code, "compare", checkpoints[1] / "sparse", checkpoints[1] / "other") == []


def test_names_are_there_when_they_are_used():
    code = "import hf_topkast; from hf_topkast import *; assert sparsify is hf_topkast.surgery.sparsify"
    assert loaded(code) == ["torch", "transformers"]
    assert loaded("import hf_topkast; assert not hasattr(hf_topkast, 'nothing')") == []


def test_elsewhere_importing_the_package_is_enough_for_from_pretrained():
    code = "import hf_topkast, transformers; "
    code += "print(transformers.PreTrainedModel.from_pretrained.__func__.__globals__['__name__'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "hf_topkast.checkpoints.loading"

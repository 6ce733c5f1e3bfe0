"""Pushing to and loading from the hub, with a stand-in for its API."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub
from toy_models import make_gpt2

from hf_topkast import export_sparse, sparsify
from hf_topkast.checkpoints import STATE_NAME


SCRIPT = """
import os, sys
import torch
from toy_models import make_gpt2, token_batches
from transformers import AutoModelForCausalLM
from hf_topkast import sparsify

def equal(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

model = sparsify(make_gpt2(), density=0.2).eval()
"""


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, tmp_path, code):
    """Runs code in a process that takes the stand-in for the hub."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(hub.requests)
    return done.stdout


def test_push_and_load(hub, tmp_path):
    code = """
model.push_to_hub("user/sparse")
assert equal(model, AutoModelForCausalLM.from_pretrained("user/sparse"))
model.save_pretrained("saved", push_to_hub=True, repo_id="user/other", max_shard_size="20KB")
loaded = AutoModelForCausalLM.from_pretrained("user/other", revision="main", cache_dir="elsewhere")
assert equal(model, loaded)
"""
    run(hub, tmp_path, code)
    assert {"user/sparse/model.safetensors", f"user/sparse/{STATE_NAME}"} <= hub.files.keys()
    assert "user/other/model.safetensors.index.json" in hub.files and f"user/other/{STATE_NAME}" in hub.files
    assert len(list((tmp_path / "elsewhere").rglob(STATE_NAME))) == 1
    assert "quantization_config" not in json.loads(hub.files["user/sparse/config.json"])


def test_subfolder_revision_and_export(hub, tmp_path):
    model = sparsify(make_gpt2(), density=0.2)
    model.save_pretrained(tmp_path / "saved" / "deep" / "part")
    export_sparse(model, tmp_path / "saved" / "small")
    for path in (tmp_path / "saved").rglob("*.*"):
        hub.files[f"user/parts/{path.relative_to(tmp_path / 'saved')}"] = path.read_bytes()
    code = f"""
assert equal(model, AutoModelForCausalLM.from_pretrained("user/parts", subfolder="deep/part", revision="{COMMIT}"))
small = AutoModelForCausalLM.from_pretrained("user/parts", subfolder="small")
tokens = token_batches(1)[0]
torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
"""
    run(hub, tmp_path, code)
    assert any(f"/resolve/{COMMIT}/deep/part/{STATE_NAME}" in request for request in hub.requests)


def test_a_dense_model_of_the_hub_is_asked_for_a_state_and_sparsified(hub, tmp_path):
    code = """
from hf_topkast import TopKastConfig
make_gpt2().push_to_hub("user/dense")
loaded = AutoModelForCausalLM.from_pretrained("user/dense", quantization_config=TopKastConfig(density=0.2))
assert equal(model, loaded)
"""
    run(hub, tmp_path, code)
    assert any(STATE_NAME in request for request in hub.requests)


def test_inspect_keeps_nothing_but_small_files(hub, tmp_path):
    code = """
import contextlib, io, json
from pathlib import Path
from hf_topkast import sparsity_report
from hf_topkast.cli import main

model.push_to_hub("user/sparse")
with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["inspect", "user/sparse", "--json"])
found = json.loads(printed.getvalue())
assert found["kind"] == "sparse" and found["totals"]["density"] == sparsity_report(model).density
kept = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*") if path.name.endswith((".json", ".safetensors"))]
assert "config.json" in kept and not any(name.endswith(".safetensors") for name in kept), kept
with contextlib.suppress(SystemExit):
    main(["inspect", "user/nothing"])
    raise AssertionError
"""
    run(hub, tmp_path, code)

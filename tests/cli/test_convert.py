import torch
from toy_models import token_batches
from transformers import AutoModelForCausalLM

from hf_topkast.surgery import sparse_layers


def test_densify(checkpoints, run_json, tmp_path):
    model, folder = checkpoints
    told = run_json("densify", folder / "sparse", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = token_batches(1)[0]
    assert not list(sparse_layers(dense))
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits)
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())


def test_export(checkpoints, run, tmp_path):
    model, folder = checkpoints
    assert "wrote" in run("export", folder / "sparse", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokens = token_batches(1)[0]
    torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 20_000


def test_bad_input(checkpoints, refused, tmp_path):
    folder = checkpoints[1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for verb in ("densify", "export"):
        assert "exists already" in refused(verb, folder / "sparse", tmp_path / "full")
        assert "nowhere" in refused(verb, tmp_path / "nowhere", tmp_path / "out")
    assert "sparse" in refused("export", folder / "dense", tmp_path / "out")

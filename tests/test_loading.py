import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import equal, trained
from toy_models import make_gpt2, token_batches
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_topkast import CheckpointError, TopKastConfig, TopKastController, densify, sparsify
from hf_topkast.checkpoint import STATE_NAME
from hf_topkast.surgery import sparse_info, sparse_layers


@pytest.mark.parametrize("settings", [{"explore_until": 100}, {"block_size": (4, 2)}], ids=str)
def test_from_pretrained_gives_the_sparse_model_back(make_model, settings, tmp_path):
    model, tokens = trained(make_model, **settings), token_batches(1)[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert equal(model, loaded)
    assert sparse_info(loaded) == sparse_info(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for (_, layer), (_, other) in zip(sparse_layers(model), sparse_layers(loaded)):
        assert torch.equal(layer.dense_weight(), other.dense_weight())
        assert torch.equal(layer.backward_mask, other.backward_mask)


def test_loaded_model_is_an_ordinary_one(tmp_path):
    trained(make_gpt2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded, "hf_quantizer", None) is None and not loaded.is_quantized
    assert not hasattr(loaded.config, "quantization_config")
    loaded.to(torch.bfloat16).float()
    TopKastController(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1))


def test_saved_again_after_loading(tmp_path):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", STATE_NAME):
        first, second = load_file(tmp_path / "first" / name), load_file(tmp_path / "second" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()


def test_dtype(tmp_path):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = copy.deepcopy(model).to(torch.bfloat16)
    assert equal(expected, loaded)


STOCK_READER = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "hf_topkast" not in sys.modules
tokens = torch.load(sys.argv[1] + "/tokens.pt")
weights = [module.weight for name, module in model.named_modules() if name.endswith(tuple(sys.argv[2].split(",")))]
torch.save({
    "loss": model(tokens, labels=tokens).loss.detach(),
    "logits": model(tokens).logits.detach(),
    "zeros": sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights),
}, sys.argv[1] + "/answer.pt")
"""


def test_stock_transformers_computes_the_same(make_model, tmp_path):
    model, tokens = trained(make_model), token_batches(1)[0]
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    names = ",".join({name.rpartition(".")[2] for name, _ in sparse_layers(model)})
    subprocess.run([sys.executable, "-c", STOCK_READER, str(tmp_path), names], check=True)
    answer = torch.load(tmp_path / "answer.pt")
    torch.testing.assert_close(answer["logits"], model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert float(answer["loss"]) == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-5)
    assert float(answer["zeros"]) == pytest.approx(0.8, abs=2e-3)


def test_without_state_the_active_weights_can_be_fine_tuned(tmp_path, caplog):
    model, tokens = trained(make_gpt2), token_batches(1)[0]
    model.save_pretrained(tmp_path)
    (tmp_path / STATE_NAME).unlink()
    with caplog.at_level("WARNING", logger="transformers"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert all(layer.backward_density == pytest.approx(0.4, abs=0.01) for _, layer in sparse_layers(loaded))


def test_missing_state_warns(tmp_path, monkeypatch):
    trained(make_gpt2).save_pretrained(tmp_path)
    (tmp_path / STATE_NAME).unlink()
    warnings = []
    monkeypatch.setattr("hf_topkast.loading.logger.warning", warnings.append)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(warnings) == 1 and "resuming the training that wrote the checkpoint does not" in warnings[0]


def test_damaged_state_is_refused(tmp_path):
    trained(make_gpt2).save_pretrained(tmp_path)
    path = tmp_path / STATE_NAME
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_models_are_saved_as_ever(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_densified_model_saves_dense(tmp_path):
    model, tokens = trained(make_gpt2), token_batches(1)[0]
    logits = model(tokens).logits
    dense = densify(model)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.transformer.h[0].mlp.c_fc) is Conv1D
    assert torch.equal(loaded(tokens).logits, dense(tokens).logits)
    torch.testing.assert_close(loaded(tokens).logits, logits)


def test_a_dense_checkpoint_is_sparsified_while_loading(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TopKastConfig(density=0.1))
    assert equal(loaded, sparsify(make_gpt2(), density=0.1))


def test_base_model_and_causal_lm_read_each_other(make_model, tmp_path):
    model, tokens = trained(make_model), token_batches(1)[0]
    model.save_pretrained(tmp_path / "lm")
    base = AutoModel.from_pretrained(tmp_path / "lm")
    assert equal(base, model.base_model)
    model.base_model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert equal(again.base_model, model.base_model)
    assert torch.equal(base(tokens).last_hidden_state, again.base_model(tokens).last_hidden_state)

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import same_weights, trained
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_topkast import CheckpointError, TopKastConfig, TopKastController, densify, export_sparse, sparsify
from hf_topkast.checkpoints import STATE_NAME, load_checkpoint
from hf_topkast.surgery import sparse_info, sparse_layers


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings of loading."""
    warnings = []
    monkeypatch.setattr("hf_topkast.checkpoints.loading.logger.warning", warnings.append)
    return warnings


@pytest.mark.parametrize(
    "settings",
    [{"explore_until": 100}, {"block_size": (4, 2)}, {"block_size": (4, 2), "scatter_blocks": True}],
    ids=str,
)
def test_from_pretrained_gives_the_sparse_model_back(make_model, settings, tmp_path):
    model, tokens = trained(make_model, **settings), token_batches(1)[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert same_weights(model, loaded)
    assert sparse_info(loaded) == sparse_info(model)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    for (_, layer), (_, other) in zip(sparse_layers(model), sparse_layers(loaded)):
        assert torch.equal(layer.dense_weight(), other.dense_weight())
        assert torch.equal(layer.backward_mask, other.backward_mask)


@pytest.mark.parametrize(
    "settings",
    [
        {"initial_density": 0.9, "schedule_end": 4, "density_schedule": "linear"},
        {"distribution": "global", "density_overrides": {r".*\.0\..*": 0.5}},
        {"method": "static"},
    ],
    ids=str,
)
def test_models_of_all_sizes_come_back_and_train_on(make_model, tmp_path, settings):
    model = trained(make_model, **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(model, loaded) and sparse_info(loaded) == sparse_info(model)
    controller = TopKastController(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1))
    before = controller.density
    controller.refresh()
    started_again = 0.9 if "initial_density" in settings else before
    assert controller.density == pytest.approx(started_again, abs=1e-3)


def test_a_pruned_model_comes_back_with_its_zeros(make_model, tmp_path):
    model = densify(sparsify(make_model(), density=0.3))
    model = sparsify(model, density="nonzero", method="static")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    assert sparse_info(loaded).config.density == "nonzero"


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
    assert same_weights(expected, loaded)


STOCK_READER = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
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


def test_without_its_state_file_a_checkpoint_is_an_ordinary_dense_one(make_model, tmp_path, said):
    model, tokens = trained(make_model), token_batches(1)[0]
    model.save_pretrained(tmp_path)
    (tmp_path / STATE_NAME).unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert not list(sparse_layers(loaded)) and not said
    sparsify(loaded, density="nonzero")
    for (_, layer), (_, other) in zip(sparse_layers(model), sparse_layers(loaded)):
        assert torch.equal(layer.weight, other.weight)


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
    torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(tokens).logits, logits)


def test_a_dense_checkpoint_is_sparsified_while_loading(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TopKastConfig(density=0.1))
    assert same_weights(loaded, sparsify(make_gpt2(), density=0.1))


def test_base_model_and_causal_lm_read_each_other(make_model, tmp_path):
    model, tokens = trained(make_model), token_batches(1)[0]
    model.save_pretrained(tmp_path / "lm")
    base = AutoModel.from_pretrained(tmp_path / "lm")
    assert same_weights(base, model.base_model)
    model.base_model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert same_weights(again.base_model, model.base_model)
    assert torch.equal(base(tokens).last_hidden_state, again.base_model(tokens).last_hidden_state)


def test_sharded(tmp_path):
    model = trained(make_llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_configuration_that_names_no_quantizer(tmp_path, said):
    model = trained(make_gpt2)
    model.config.quantization_config = None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] is None
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config is None
    for given in ({}, {"config": config}):
        assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path, **given))
    assert not said


def test_a_model_with_nan_comes_back_as_it_was_saved(tmp_path, said):
    model = trained(make_gpt2)
    layer = next(layer for _, layer in sparse_layers(model))
    layer.values.data[[0, -1]] = torch.nan  # one of A and one of B\\A
    model.save_pretrained(tmp_path)
    loaded = next(layer for _, layer in sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert torch.equal(loaded.values.isnan(), layer.values.isnan()) and not said


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    if not torch.cuda.is_available():
        assert same_weights(model, loaded)
    TopKastController(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1))


def test_offloading_to_disk_is_refused(tmp_path):
    trained(make_llama).save_pretrained(tmp_path / "sparse")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ValueError, match=r"'model\.layers\.1.*on disk.*without device_map"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "sparse", device_map=device_map, offload_folder=str(tmp_path / "off")
        )


@pytest.mark.parametrize("dtype", [torch.float16, "auto", "bfloat16"])
def test_dtype_in_every_spelling(tmp_path, dtype):
    model = trained(make_llama)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert same_weights(copy.deepcopy(model).to(wanted), loaded)


def test_settings_of_the_user_do_not_change_what_was_saved(tmp_path):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TopKastConfig(density=0.5))
    assert same_weights(model, loaded) and sparse_info(loaded).config == sparse_info(model).config


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_export_is_exact_and_as_small_as_predicted(make_model, tmp_path):
    model, tokens = trained(make_model), token_batches(1)[0]
    export_sparse(model, tmp_path)
    layers = [layer for _, layer in sparse_layers(model)]
    predicted = sum(4 * layer.active_count + -(-layer.numel // 8) for layer in layers)
    state = tmp_path / STATE_NAME
    assert state.stat().st_size - header_bytes(state) == predicted
    assert predicted == pytest.approx(sum(layer.numel * (0.2 * 4 + 1 / 8) for layer in layers), rel=1e-2)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(weights[f"{name}.weight"].numel() == 0 for name, _ in sparse_layers(model))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    for (name, layer), (other_name, other) in zip(sparse_layers(model), sparse_layers(loaded)):
        assert name == other_name and type(layer) is type(other)
        assert torch.equal(layer.active_mask, other.active_mask)
        assert torch.equal(other.active_mask, other.backward_mask)
        assert torch.equal(layer.weight, other.dense_weight())
    assert not hasattr(model.config, "quantization_config")


def test_an_export_can_be_trained_saved_and_densified(make_model, tmp_path):
    export_sparse(trained(make_model), tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    TopKastController(loaded, optimizer)
    for tokens in token_batches(2):
        loaded(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.backward_density == pytest.approx(0.4, abs=0.01) for _, layer in sparse_layers(loaded))
    loaded.save_pretrained(tmp_path / "saved")
    assert same_weights(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    densify(loaded.eval())


def test_export_in_another_dtype_sharded_and_of_the_base_model(tmp_path):
    model, tokens = trained(make_llama), token_batches(1)[0]
    export_sparse(model, tmp_path / "all", max_shard_size="6KB")
    assert len(list((tmp_path / "all").glob("model-*.safetensors"))) > 1
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype=torch.bfloat16, device_map="cpu")
    expected = densify(copy.deepcopy(model)).to(torch.bfloat16).state_dict()
    found = densify(half).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    base = AutoModel.from_pretrained(tmp_path / "all")
    assert torch.equal(base(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)


def test_an_export_of_scattered_blocks_is_exact(make_model, tmp_path):
    model, tokens = trained(make_model, block_size=4, scatter_blocks=True), token_batches(1)[0]
    export_sparse(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (_, layer), (_, other) in zip(sparse_layers(model), sparse_layers(loaded)):
        assert torch.equal(layer.weight, other.dense_weight()) and layer.row_stride == other.row_stride != 1
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(densify(loaded)(tokens).logits, densify(model)(tokens).logits)


def test_an_export_is_no_checkpoint_to_resume_from(tmp_path):
    model = trained(make_gpt2)
    export_sparse(model, tmp_path)
    with pytest.raises(CheckpointError, match="compact export.*from_pretrained"):
        load_checkpoint(model, tmp_path)


def test_export_needs_a_sparse_model(tmp_path):
    with pytest.raises(ValueError, match="no sparse layers"):
        export_sparse(make_gpt2(), tmp_path)


def test_stock_transformers_stops_at_an_export(tmp_path):
    export_sparse(trained(make_gpt2), tmp_path)
    torch.save(token_batches(1)[0], tmp_path / "tokens.pt")
    done = subprocess.run([sys.executable, "-c", STOCK_READER, str(tmp_path), "c_fc"], capture_output=True, text=True)
    assert done.returncode != 0 and "mismatch" in done.stderr


def test_an_export_without_its_state_is_refused(tmp_path):
    export_sparse(trained(make_gpt2), tmp_path)
    (tmp_path / STATE_NAME).unlink()
    with pytest.raises((RuntimeError, CheckpointError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy_models import make_gpt2, make_llama
from toy_training import same_weights, trained

from hf_topkast import CheckpointError, sparsify
from hf_topkast.checkpoints.checkpoint import STATE_NAME, load_checkpoint, read_state, split_state_dict
from hf_topkast.surgery import sparse_info, sparse_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained GPT-2 and the directory it was saved in; tests change copies only."""
    model = trained(make_gpt2)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "checkpoint")


def test_load_is_exact(make_model, tmp_path):
    model = trained(make_model)
    model.save_pretrained(tmp_path)
    other = sparsify(make_model(seed=1), density=0.3)
    values = [layer.values for _, layer in sparse_layers(other)]
    state = load_checkpoint(other, tmp_path)
    assert same_weights(model, other)
    assert [layer.values for _, layer in sparse_layers(other)] == values
    assert state.step == sparse_info(other).step == 3
    assert state.config == sparse_info(model).config


def test_sharded_weights(tmp_path):
    model = trained(make_llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = sparsify(make_llama(seed=1), density=0.2)
    load_checkpoint(other, tmp_path)
    assert same_weights(model, other)


def test_files_hold_what_the_format_says(saved):
    model, directory = saved
    weights, state = load_file(directory / "model.safetensors"), load_file(directory / STATE_NAME)
    assert weights.keys() == {key for key in make_gpt2().state_dict() if key != "lm_head.weight"}
    for name, layer in sparse_layers(model):
        assert torch.equal(weights[f"{name}.weight"], layer.weight)
        assert state[f"{name}.rest"].numel() == layer.numel - layer.active_count
        assert state[f"{name}.active"].numel() == state[f"{name}.backward"].numel() == -(-layer.numel // 8)
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert json.loads((directory / "topkast_config.json").read_text()) == sparse_info(model).config.to_dict()
    assert not hasattr(model.config, "quantization_config")


def test_split_leaves_the_given_state_dict_alone(saved):
    model, _ = saved
    state_dict = model.state_dict()
    keys = list(state_dict)
    stock, _ = split_state_dict(model, state_dict)
    assert list(state_dict) == keys
    assert stock.keys() == make_gpt2().state_dict().keys()


def check_refused(directory, match, model=None):
    model = model or sparsify(make_gpt2(seed=1), density=0.2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(model, directory)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_missing_state(directory):
    (directory / STATE_NAME).unlink()
    check_refused(directory, "is missing.*cannot be resumed.*from_pretrained")


def test_missing_weights(directory):
    (directory / "model.safetensors").unlink()
    check_refused(directory, "model.safetensors is missing or damaged")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_state(directory, keep):
    path = directory / STATE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    check_refused(directory, "truncated or damaged")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_loads(saved, tmp_path, place, bit):
    content = bytearray((saved[1] / STATE_NAME).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (tmp_path / STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_state(tmp_path)


def test_other_format_version(directory):
    path = directory / STATE_NAME
    save_file(load_file(path), path, {"format_version": "99"})
    check_refused(directory, "format version '99'.*reads 1")


def test_other_architecture(directory):
    check_refused(directory, "another model: layer", sparsify(make_llama(), density=0.2))


def test_other_targets(directory):
    check_refused(
        directory, "sparse only in the checkpoint", sparsify(make_gpt2(), density=0.2, target_modules=["c_fc"])
    )


def test_other_shape(tmp_path):
    trained(make_llama).save_pretrained(tmp_path / "llama")
    other = sparsify(make_llama(), density=0.2)
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(weights, path, {"format": "pt"})
    check_refused(tmp_path / "llama", r"up_proj.weight' is \(39, 24\) there and \(40, 24\) here", other)


def test_weights_of_another_moment(directory):
    trained(make_gpt2, seed=5).save_pretrained(directory.parent / "other")
    shutil.copy(directory.parent / "other" / "model.safetensors", directory / "model.safetensors")
    check_refused(directory, "not saved together")


def test_weights_of_another_step_with_the_same_active_set(tmp_path):
    model = trained(make_gpt2, refresh_every=1000)
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            layer.values *= 1.001
    model.save_pretrained(tmp_path / "second")
    shutil.copy(tmp_path / "second" / "model.safetensors", tmp_path / "first" / "model.safetensors")
    check_refused(tmp_path / "first", "not saved together")


def test_no_directory(tmp_path):
    check_refused(tmp_path / "nowhere", "no checkpoint directory")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"), "c_fc.weight' is missing there"),
        (lambda weights: weights.pop("transformer.ln_f.bias"), "ln_f.bias' is missing there"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "it has 'extra'"),
        (lambda weights: weights.update({"transformer.wpe.weight": torch.zeros(3, 24)}), r"wpe.weight' is \(3, 24\)"),
    ],
)
def test_other_dense_weights(directory, change, match):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    check_refused(directory, match)


def test_other_blocks(tmp_path):
    trained(make_gpt2, block_size=(4, 2)).save_pretrained(tmp_path)
    check_refused(tmp_path, r"blocks.*block_size of the checkpoint", sparsify(make_gpt2(seed=1), density=0.2))
    scattered = sparsify(make_gpt2(seed=1), density=0.2, block_size=(4, 2), scatter_blocks=True)
    check_refused(tmp_path, "scatter_blocks=False, and layer .* another scatter_blocks", scattered)
    other = sparsify(make_gpt2(seed=1), density=0.2, block_size=(4, 2))
    load_checkpoint(other, tmp_path)

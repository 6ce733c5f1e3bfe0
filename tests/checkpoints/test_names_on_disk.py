import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_family
from toy_models import make_llama
from transformers import AutoModel
from transformers.core_model_loading import Transpose, WeightConverter

from hf_topkast import CheckpointError, densify, export_sparse, sparsify
from hf_topkast.checkpoints import load_checkpoint, names_on_disk
from hf_topkast.checkpoints.names_on_disk import to_model_names


def same(found, expected, tied=()):
    return found.keys() == expected.keys() - set(tied) and all(torch.equal(found[key], expected[key]) for key in found)


def saved(model, directory, **settings):
    model.save_pretrained(directory, **settings)
    return {key: tensor for file in directory.glob("model*.safetensors") for key, tensor in load_file(file).items()}


def make_sparse(make_model, seed, directory=None, **settings):
    """A sparse model with experts kept dense, saved where a directory is given."""
    model = sparsify(make_model(seed), density=0.3, exclude_modules=["experts"])
    if directory is not None:
        model.save_pretrained(directory, **settings)
    return model


def make_mixtral(seed=0, **settings):
    """With so many experts that the tenth comes before the second by the alphabet."""
    model = make_family("mixtral")
    model.config.update({"num_local_experts": 11, **settings})
    torch.manual_seed(seed)
    return type(model)(model.config)


# Renamed; experts merged; transposed; interleaved; right already; models inside models, with rules of their own.
KINDS = ["gpt_neox", "mixtral", "aria_text", "inkling2_text", "deepseek_v4", "gemma3", "olmo_hybrid", "fuyu"]


@pytest.mark.parametrize("family", [family for family in KINDS if family in FAMILIES])
def test_a_dense_model_comes_back(family, tmp_path):
    model = make_mixtral() if family == "mixtral" else make_family(family)
    expected = model.state_dict()
    weights = saved(model, tmp_path)
    found = to_model_names(model, weights, expected, tmp_path)
    assert not weights
    assert same(found, expected, tied={"lm_head.weight"} - found.keys())


def test_tensors_of_a_model_without_rules_are_not_touched(tmp_path):
    model = make_llama()
    weights = saved(model, tmp_path)
    given = dict(weights)
    found = to_model_names(model, weights, model.state_dict(), tmp_path)
    assert found.keys() == given.keys()
    assert all(found[key] is given[key] for key in given)


def test_a_rule_that_looks_at_a_parameter_sees_the_dense_one(tmp_path, monkeypatch):
    rules = [WeightConverter("up_proj.weight", "up_proj.weight", [Transpose(check_dims=True)])]
    monkeypatch.setattr(names_on_disk, "get_model_conversion_mapping", lambda model: rules)
    model = make_llama()
    dense = model.state_dict()
    stored = {key: tensor.T if "up_proj" in key else tensor for key, tensor in dense.items()}
    assert same(to_model_names(sparsify(model, density=0.3), stored, dense, tmp_path), dense)


def test_a_model_of_no_family_has_its_names_on_disk(tmp_path):
    model = torch.nn.Linear(2, 3)
    weights = {"LayerNorm.gamma": torch.ones(3)}  # which transformers renames in each of its own models
    assert to_model_names(model, weights, model.state_dict(), tmp_path) is weights


def test_names_of_nobody_stay(tmp_path):
    model = make_mixtral()
    weights = saved(model, tmp_path)
    weights["model.layers.9.block_sparse_moe.experts.0.w2.weight"] = odd = torch.ones(1)
    found = to_model_names(model, weights, model.state_dict(), tmp_path)
    assert found.pop("model.layers.9.block_sparse_moe.experts.0.w2.weight") is odd
    assert same(found, model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "8KB"}, {"save_original_format": False}])
def test_a_sparse_model_with_dense_experts(settings, tmp_path):
    model = make_sparse(make_mixtral, 0, tmp_path, **settings)
    other = make_sparse(make_mixtral, 1)
    load_checkpoint(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())


def test_a_model_without_a_head(tmp_path):
    def make_base(seed):
        torch.manual_seed(seed)
        return AutoModel.from_config(make_mixtral().config)

    model = make_sparse(make_base, 0, tmp_path)
    other = make_sparse(make_base, 1)
    load_checkpoint(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())


def test_tied_weights(tmp_path):
    def make_tied(seed):
        return make_mixtral(seed, tie_word_embeddings=True)

    model = make_sparse(make_tied, 0, tmp_path)
    other = make_sparse(make_tied, 1)
    load_checkpoint(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight


@pytest.mark.parametrize("kept", [0, 1])
def test_a_layer_that_stands_in_two_places(kept, tmp_path):
    def make_shared(seed):
        model = make_llama(seed)
        first, second = model.model.layers
        second.mlp = first.mlp
        model._tied_weights_keys = {f"layers.{1 - kept}.mlp": f"layers.{kept}.mlp"}
        return sparsify(model, density=0.3)

    model, other = make_shared(0), make_shared(1)
    assert {key.split(".")[2] for key in saved(model, tmp_path) if "mlp" in key} == {str(kept)}
    load_checkpoint(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())


def test_names_that_the_user_gave_by_key_mapping(tmp_path):
    first = make_llama()
    weights = {f"their.{key}": tensor for key, tensor in saved(first, tmp_path / "theirs").items()}
    save_file(weights, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})

    def read():
        return type(first).from_pretrained(tmp_path / "theirs", key_mapping={r"^their\.": ""})

    model, other = (sparsify(read(), density=density) for density in (0.3, 0.5))
    assert any(key.startswith("their.") for key in saved(model, tmp_path / "ours"))
    load_checkpoint(other, tmp_path / "ours")
    assert same(other.state_dict(), model.state_dict())


def check_refused(change, match, directory):
    make_sparse(make_mixtral, 0, directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    other = make_sparse(make_mixtral, 1)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(other, directory)
    assert same(other.state_dict(), before)


EXPERTS = "model.layers.0.block_sparse_moe.experts"


def test_half_an_expert_is_missing(tmp_path):
    match = f"{tmp_path}.*'{EXPERTS}.0.w1.weight' and 20 other.*'model.layers.0.mlp.experts.gate_up_proj'"
    check_refused(lambda weights: weights.pop(f"{EXPERTS}.3.w3.weight"), match, tmp_path)


def test_an_expert_is_missing(tmp_path):
    match = r"'model.layers.0.mlp.experts.down_proj' is \(10, .*there and \(11, .* here"
    check_refused(lambda weights: weights.pop(f"{EXPERTS}.1.w2.weight"), match, tmp_path)


def test_an_expert_of_another_size(tmp_path):
    match = "damaged or belongs to another model.*do not make up 'model.layers.0.mlp.experts.down_proj'"
    check_refused(lambda weights: weights.update({f"{EXPERTS}.1.w2.weight": torch.ones(2, 2)}), match, tmp_path)


def test_experts_that_are_there_twice(tmp_path):
    whole = make_mixtral().state_dict()["model.layers.0.mlp.experts.down_proj"]
    match = "has the weights of 'model.layers.0.mlp.experts.down_proj' twice"
    check_refused(lambda weights: weights.update({"model.layers.0.mlp.experts.down_proj": whole}), match, tmp_path)


@pytest.mark.parametrize("family", [family for family in KINDS[1:5] if family in FAMILIES])
def test_a_model_with_sparse_experts(family, tmp_path):
    def make(seed):
        model = make_mixtral(seed) if family == "mixtral" else make_family(family, seed)
        return sparsify(model, density=0.3)

    model, other = make(0), make(1)
    model.save_pretrained(tmp_path)
    load_checkpoint(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())
    export_sparse(model, tmp_path / "compact")
    loaded = type(model).from_pretrained(tmp_path / "compact")
    dense = densify(model).state_dict()
    assert same(densify(loaded).state_dict(), dense)


def test_sparse_experts_of_another_number_are_refused(tmp_path):
    sparsify(make_mixtral(), density=0.3).save_pretrained(tmp_path)
    other = sparsify(make_family("mixtral"), density=0.3)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.\S+ is \(11, .*there and \(4, .*here"):
        load_checkpoint(other, tmp_path)

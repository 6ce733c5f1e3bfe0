import copy
import itertools

import pytest
import torch
from toy_models import make_gpt2, make_llama
from toy_training import trained

from hf_topkast import densify, export_sparse
from hf_topkast.surgery import sparse_layers


def masks_and_weights(model):
    return {name: (layer.active_mask, layer.to_rows(layer.weight)) for name, layer in sparse_layers(model)}


def test_against_the_models(checkpoints, run_json):
    from transformers import AutoModelForCausalLM

    folder = checkpoints[1]
    found = run_json("compare", folder / "sparse", folder / "other")
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("sparse", "other")]
    one, two = map(masks_and_weights, models)
    total = [0, 0]
    for layer in found["layers"]:
        (first, alpha), (second, beta) = (
            (mask if layer_weight.shape == mask.shape else mask.T, layer_weight)
            for mask, layer_weight in (one[layer["name"]], two[layer["name"]])
        )
        both, either = int((first & second).sum()), int((first | second).sum())
        total = [total[0] + both, total[1] + either]
        assert layer["overlap"] == pytest.approx(both / either)
        assert layer["difference"] == pytest.approx(((alpha - beta).norm() / alpha.norm()).item(), rel=1e-4)
        assert layer["densities"] == [pytest.approx(float(first.float().mean()))] * 2
    assert found["overlap"] == pytest.approx(total[0] / total[1])


@pytest.mark.parametrize("form", ["sparse", "compact", "sharded"])
def test_a_checkpoint_equals_itself_in_every_form(checkpoints, run_json, form):
    folder = checkpoints[1]
    found = run_json("compare", folder / form, folder / "sparse")
    assert len(found["layers"]) == 8
    assert all(layer["overlap"] == 1 and layer["difference"] == 0 for layer in found["layers"])


def test_with_a_dense_one(checkpoints, run_json, tmp_path):
    """Whether its matrices stand as (in, out) is found out also for the square ones."""
    model, folder = checkpoints
    dense = make_gpt2()
    state = {name: layer.weight for name, layer in sparse_layers(model)}
    with torch.no_grad():
        for name, weight in state.items():
            dense.get_submodule(name).weight.copy_(weight)
    dense.save_pretrained(tmp_path / "dense")
    for pair in (("sparse", "dense"), ("dense", "sparse"), ("compact", "dense")):
        places = [tmp_path / name if name == "dense" else folder / name for name in pair]
        found = run_json("compare", *places)
        assert all(layer["overlap"] == 1 and layer["difference"] == 0 for layer in found["layers"]), pair


@pytest.mark.parametrize("make_model", [make_gpt2, make_llama])
def test_scattered_blocks(make_model, run_json, tmp_path):
    model = trained(make_model, block_size=4, scatter_blocks=True)
    model.save_pretrained(tmp_path / "sparse")
    export_sparse(model, tmp_path / "compact")
    densify(copy.deepcopy(model)).save_pretrained(tmp_path / "dense")
    for pair in itertools.permutations(["sparse", "compact", "dense"], 2):
        found = run_json("compare", *(tmp_path / name for name in pair))
        assert all(layer["overlap"] == 1 and layer["difference"] == 0 for layer in found["layers"]), pair


def test_table(checkpoints, run):
    folder = checkpoints[1]
    assert "transformer.h.0.attn.c_attn" in run("compare", folder / "sparse", folder / "other")


def test_bad_input(checkpoints, refused, tmp_path):
    folder = checkpoints[1]
    make_llama().save_pretrained(tmp_path / "llama")
    assert "no sets to compare" in refused("compare", folder / "dense", tmp_path / "llama")
    assert "has no 'transformer.h.0" in refused("compare", folder / "sparse", tmp_path / "llama")
    trained(make_llama).save_pretrained(tmp_path / "sparse llama")
    assert "sparse llama has no 'transformer.h.0" in refused("compare", folder / "sparse", tmp_path / "sparse llama")
    assert "There is no directory" in refused("compare", folder / "sparse", tmp_path / "nowhere")

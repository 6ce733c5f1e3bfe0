"""What a layer carries goes over to its replacement and back, or is refused by name."""

import copy

import pytest
import torch
import torch.nn.utils as utils
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from torch import nn
from torch.nn.utils import prune
from toy_models import make_gpt2, make_llama, token_batches
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

from hf_topkast import TopKastController, densify, sparsify
from hf_topkast.layers import TopKastLayer
from hf_topkast.surgery import sparse_layers


TOKENS = token_batches(1)[0]


def run(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.zero_grad()


def sparsify_all(model):
    return sparsify(model, density=0.2)


def with_hooks(layer):
    """Hooks of every kind that note their calls, and their handles."""
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: calls.append("before")),
        layer.register_forward_hook(lambda module, inputs, output: calls.append("after")),
        layer.register_forward_hook(lambda module, args, kwargs, output: calls.append("named"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, dx, dy: calls.append("backward")),
        layer.register_full_backward_pre_hook(lambda module, dy: calls.append("before backward")),
    ]
    return calls, handles


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_hooks_stay_through_sparsify_and_densify(make):
    model = make()
    name = "transformer.h.0.mlp.c_fc" if make is make_gpt2 else "model.layers.0.mlp.up_proj"
    calls, handles = with_hooks(model.get_submodule(name))
    run(model)
    expected = list(calls)
    assert len(expected) == 5
    for change in (lambda: sparsify(model, density=0.2), lambda: densify(model)):
        change()
        calls.clear()
        run(model)
        assert calls == expected
    sparsify(model, density=0.2)
    for handle in handles:
        handle.remove()
    calls.clear()
    run(model)
    assert not calls


def test_a_hook_on_a_sparse_layer_stays_when_it_is_densified():
    model = sparsify(make_gpt2(), density=0.2)
    calls, _ = with_hooks(model.transformer.h[0].mlp.c_fc)
    densify(model)
    run(model)
    assert len(calls) == 5


def test_attributes_stay_and_those_of_sparse_layers_go():
    model = make_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.tag, layer.role = "kept", {"rank": 3}
    dense = {key for key in vars(layer) if not key.startswith("_")}
    sparsify(model, density=0.2)
    assert model.model.layers[0].mlp.up_proj.tag == "kept"
    densify(model)
    layer = model.model.layers[0].mlp.up_proj
    assert {key for key in vars(layer) if not key.startswith("_")} == dense
    assert layer.tag == "kept" and layer.role == {"rank": 3}


def test_a_hook_on_the_weight_is_said_to_be_lost(monkeypatch):
    said = []
    monkeypatch.setattr("hf_topkast.surgery.carry.logger.warning", said.append)
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: None)
    sparsify(model, density=0.2)
    assert len(said) == 1 and "'model.layers.1.mlp.up_proj' has hooks on its gradient" in said[0]


COMPUTED = {
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove"),
    "weight_norm": (utils.weight_norm, "remove_weight_norm"),
    "parametrized": (utils.parametrizations.weight_norm, "remove_parametrizations"),
    "spectral": (utils.parametrizations.spectral_norm, "remove_parametrizations"),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("rule", [{}, {"target_modules": "all-linear"}, {"target_modules": ["up_proj"]}], ids=str)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_computed_weight_is_refused_by_name(kind, rule):
    change, way_out = COMPUTED[kind]
    model = make_llama()
    change(model.model.layers[1].mlp.up_proj)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"'model\.layers\.1\.mlp\.up_proj' is computed from.*{way_out}.*exclude_modules"
    ):
        sparsify(model, density=0.2, **rule)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    sparsify(model, density=0.2, exclude_modules=["layers.1.mlp.up_proj"])
    assert not isinstance(model.model.layers[1].mlp.up_proj, TopKastLayer)


def test_a_pruned_layer_after_remove_is_taken_as_it_is():
    model = make_llama()
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for layer in layers:
        prune.remove(layer, "weight")
    weights = {name: model.get_submodule(name).weight.clone() for name, m in model.named_modules() if m in layers}
    sparsify(model, density="nonzero", method="static")
    assert len(weights) == len(list(sparse_layers(model)))
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in sparse_layers(model))


def test_a_forward_of_its_own_is_refused():
    model = make_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' has a forward of its own"):
        sparsify(model, density=0.2)
    del layer.forward
    sparsify(model, density=0.2)


def test_accelerates_hook_moves_to_the_sparse_layer_and_back():
    model = make_llama().eval()
    layer = model.model.layers[0].mlp.up_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hook, x = layer._hf_hook, torch.randn(3, layer.in_features)
    sparsify(model, density=0.2)
    sparse = model.model.layers[0].mlp.up_proj
    assert isinstance(sparse, TopKastLayer) and sparse._hf_hook is hook
    torch.testing.assert_close(sparse(x), x @ sparse.weight.T)
    run(model.train())
    assert all(layer.values.grad is None for _, layer in sparse_layers(model))  # run() has put them back
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(layer.values.grad is not None for _, layer in sparse_layers(model))
    densify(model)
    dense = model.model.layers[0].mlp.up_proj
    assert dense._hf_hook is hook
    torch.testing.assert_close(dense(x), x @ dense.weight.T)


def test_accelerates_hooks_that_were_taken_off_leave_nothing_behind():
    model = make_llama()
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 24)
    for change in (lambda: sparsify(model, density=0.2), lambda: densify(model)):
        layer = model.model.layers[0].mlp.up_proj
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
        remove_hook_from_module(layer)
        change()
        after = model.model.layers[0].mlp.up_proj
        x = torch.randn(3, after.in_features)
        torch.testing.assert_close(after(x), x @ after.weight.T)
        assert "forward" not in vars(after)


def test_an_offloaded_model_is_refused_and_stays_as_it_was():
    for verb, model in ((sparsify_all, make_llama()), (densify, sparsify(make_llama(), density=0.2))):
        expected = model.eval()(TOKENS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"'model\.layers\.0\..*meta device.*remove_hook_from_submodules"):
            verb(model)
        assert torch.equal(model(TOKENS).logits, expected)
        remove_hook_from_submodules(model)
        verb(model)


def test_a_forward_of_its_own_under_accelerates_hook_and_on_a_sparse_layer_is_refused():
    model = make_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match="has a forward of its own"):
        sparsify(model, density=0.2)
    model = sparsify(make_llama(), density=0.2)
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(ValueError, match="has a forward of its own"):
        densify(model)
    assert list(sparse_layers(model))


def test_a_hook_of_loading_goes_on_with_the_new_layer():
    model, seen = make_llama(), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_load_state_dict_pre_hook(lambda module, *arguments: seen.append(type(module).__name__))
    sparsify(model, density=0.2)
    model.load_state_dict(model.state_dict())
    densify(model)
    model.load_state_dict(model.state_dict())
    assert seen == ["TopKastLinear", "Linear"]


def encoder():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(vocab_size=64, max_position_embeddings=64, pad_token_id=0, **sizes)


@pytest.mark.parametrize("back", [False, True], ids=["sparse", "densified"])
def test_transformers_does_not_draw_the_weights_anew(back):
    torch.manual_seed(0)
    model = sparsify(BertModel(encoder()), density=0.5).eval()
    model = densify(model) if back else model
    before = model(TOKENS).last_hidden_state
    model.post_init()
    assert torch.equal(model(TOKENS).last_hidden_state, before)
    decoder = BertConfig(**{**encoder().to_dict(), "is_decoder": True, "add_cross_attention": True})
    whole = EncoderDecoderModel(encoder=model, decoder=BertLMHeadModel(decoder))
    assert torch.equal(whole.encoder.eval()(TOKENS).last_hidden_state, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_made_in_inference_mode_and_trained(mode):
    model = make_gpt2()
    with mode():
        sparsify(model, density=0.2, refresh_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert controller.mask_churn is not None
    optimizer.zero_grad()
    with mode():
        densify(model)
    run(model)

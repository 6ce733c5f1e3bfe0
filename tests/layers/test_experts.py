import copy
import io
import pickle
import re

import pytest
import torch
from tiny_families import VOCABULARY, make_family
from torch import nn
from torch.nn import functional
from toy_models import loss_of
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_topkast import TopKastController, densify, sparsify
from hf_topkast.layers import (
    TopKastGroupedLinear,
    TopKastLayer,
    TopKastLinear,
    expert_stacks,
    layer_named,
    topkast_experts_forward,
)
from hf_topkast.surgery import sparse_layers


TOKENS = torch.randint(2, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(0))
# Plain; transposed, with biases, gate and up in turn; without a gate; experts within a group of layers.
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"]
UNDECORATED = ["jetmoe", "longcat_flash", "llama4_text", "inkling_text"]


def make_sparse(family="mixtral", **settings):
    return sparsify(make_family(family), **{"density": 0.3, "refresh_every": 2, **settings})


def first_experts(model):
    """The first experts layer, and its name."""
    return next((name, layer) for name, layer in sparse_layers(model) if isinstance(layer, TopKastGroupedLinear))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def step(model, **settings):
    """A training step with a refresh behind it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = TopKastController(model.train(), optimizer)
    loss_of(model, TOKENS).backward()
    optimizer.step()
    optimizer.zero_grad()
    controller.refresh()
    controller.remove()
    return model


def gradients(model, forward=None):
    model.zero_grad()
    loss_of(forward or model, TOKENS).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(one, two):
    assert one.keys() == two.keys()
    for key, number in one.items():
        assert torch.equal(number, two[key]), key


# What the layer looks like


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_views_are_in_the_stock_layout(family):
    stock = make_family(family).model.layers[0].mlp.experts.gate_up_proj.detach()
    model = make_sparse(family)
    name, layer = first_experts(model)
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert layer.shape == layer.stock_shape == stock.shape == layer.weight.shape
    assert layer.stores_transposed == (family == "gpt_oss")
    assert torch.equal(layer.dense_weight(), stock)
    assert torch.equal(layer.weight, stock * layer.active_mask)
    matrices = stock.mT if layer.stores_transposed else stock
    assert (layer.experts, layer.out_features, layer.in_features) == tuple(matrices.shape)
    assert torch.equal(layer.theta(), matrices.reshape(-1, layer.in_features))
    masks = layer.active_mask.mT if layer.stores_transposed else layer.active_mask
    for matrix, mask in zip(matrices, masks):  # each expert's largest weights
        assert int(mask.sum()) == round(0.3 * matrix.numel())
        assert matrix[mask].abs().min() >= matrix[~mask].abs().max()
    assert torch.equal(layer.to_rows(layer.to_stock(layer.theta())), layer.theta())
    with pytest.raises(RuntimeError, match="writes to the weight"):
        layer.weight.add_(1)


def test_representation():
    model = make_sparse()
    experts = "(gate_up_proj): TopKastGroupedLinear(experts=4, in_features=32, out_features=96, density=0.3001, "
    assert f"{experts}backward_density=0.5999)" in str(model)
    assert "block_size=(2, 4)" in repr(first_experts(make_sparse(block_size=[2, 4]))[1])
    assert "on the meta device" in repr(first_experts(make_sparse())[1].to("meta"))


def test_the_module_and_what_else_it_has_stay():
    stock, model = make_family("gpt_oss"), make_sparse("gpt_oss")
    experts, kept = stock.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts
    assert type(experts) is type(kept)
    assert sorted(key for key, _ in kept.named_parameters()) == [
        *("down_proj.values", "down_proj_bias", "gate_up_proj.values", "gate_up_proj_bias")
    ]
    assert isinstance(layer_named(model, "model.layers.0.mlp.experts.down_proj"), TopKastGroupedLinear)
    assert layer_named(stock, "model.layers.0.mlp.experts.down_proj").owner is experts
    assert layer_named(stock, "model.layers.0.mlp.experts.none") is layer_named(stock, "no.such") is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe"])
def test_densify_puts_the_parameter_back_where_it_stood(family):
    stock = make_family(family)
    names = [name for name, _ in stock.named_parameters()]
    model = step(make_sparse(family)).eval()
    logits = logits_of(model)
    densify(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-5)
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        assert config is None or config is model.config or not hasattr(config, "_stock_config"), name
        assert not module._load_state_dict_pre_hooks, name
        assert "_stock_order" not in vars(module)
    sparsify(model, density=0.3)  # once more


# What it computes


@pytest.mark.parametrize("family", [*FAMILIES, *UNDECORATED])
def test_output_is_that_of_the_dense_model(family):
    model = step(make_sparse(family)).eval()
    dense = densify(copy.deepcopy(model))
    for implementation in ("eager", "grouped_mm"):
        if family not in UNDECORATED:
            dense.set_experts_implementation(implementation)
        torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-5)
    one = model(input_ids=TOKENS[:1, :1]).logits  # with a graph
    torch.testing.assert_close(one, dense(input_ids=TOKENS[:1, :1]).logits, rtol=1e-4, atol=1e-5)


def test_numbers_past_the_last_expert_give_nothing():
    experts = make_sparse().model.layers[0].mlp.experts
    hidden, weights = torch.randn(6, 32), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [4, 2], [3, 4], [4, 5], [2, 0], [1, 4]])
    found = experts(hidden, index, weights)
    here = index.clamp(max=3)
    torch.testing.assert_close(found, experts(hidden, here, weights * (index < 4)))
    assert not found[3].any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("key", ["gate_up_proj", "down_proj"])
def test_one_parameter_of_two_may_stay_dense(family, key):
    model = sparsify(make_family(family), density=0.3, target_modules=[key])
    layers = [name for name, layer in sparse_layers(model) if ".experts." in name]
    assert len(layers) == 2 and all(name.endswith(key) for name in layers)
    dense = densify(copy.deepcopy(model))
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-5)
    found, expected = gradients(model), gradients(dense)
    for name, gradient in found.items():
        if not name.endswith("values"):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    experts = model.model.layers[0].mlp.experts
    index = torch.full((3, 2), 4)  # nothing is read that nobody has written
    assert not experts(torch.randn(3, 32), index, torch.rand(3, 2)).any()


def test_blocks_of_one_model_may_stay_dense():
    model = make_sparse(exclude_modules=r".*\.0\.mlp\.experts")
    names = [name for name, _ in sparse_layers(model) if ".experts." in name]
    assert names == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    logits = logits_of(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-5)


def test_who_changes_the_models_implementation_does_not_concern_sparse_experts():
    model = make_sparse()
    expected = gradients(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        same(gradients(model), expected)
    densify(model)
    assert model.model.layers[0].mlp.experts.config is model.config


def test_autocast():
    model = make_sparse()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, TOKENS)
    loss.backward()
    assert first_experts(model)[1].values.grad.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(model, TOKENS), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = sparsify(make_family("mixtral").to(dtype), density=0.3)
    dense = densify(copy.deepcopy(model))
    dense.set_experts_implementation("eager")
    expected = logits_of(dense)
    assert logits_of(model).dtype == dtype
    torch.testing.assert_close(
        logits_of(model), expected, **({"rtol": 5e-2, "atol": 5e-2} if dtype.itemsize == 2 else {})
    )


def test_one_gradient_for_all_and_zeros_for_experts_without_tokens():
    model = make_sparse()
    layer = first_experts(model)[1]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(input_ids=TOKENS[:1, :1]).logits.sum().backward()
    counts = seen[0].diff(prepend=seen[0].new_zeros(1))
    assert counts.tolist().count(0) == 2
    rows = layer.pattern.flat_index() // (layer.out_features * layer.in_features)
    for expert, count in enumerate(counts.tolist()):
        assert bool(layer.values.grad[rows == expert].any()) == (count > 0)


# Copies, checkpointing, graphs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_copies_compute_the_same(family):
    model = step(make_sparse(family))
    expected = gradients(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for each in copies:
        same(gradients(each), expected)
        experts = [m for m in each.modules() if hasattr(m, "has_gate")]
        assert all(owner.config._stock_config is each.config for owner in experts)
    other = make_sparse(family, density=0.1)
    other.load_state_dict(model.state_dict())
    same(gradients(other), expected)
    densify(copies[0])
    assert list(sparse_layers(copies[1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = make_sparse().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(gradients(model), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_training_step_is_one_graph_across_refreshes(family):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_sparse(family).train()
    model.loss_type = "ForCausalLM"
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for forward, each in ((compiled, model), (plain, plain)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        TopKastController(each, optimizer)
        for _ in range(5):
            forward(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (name, layer), (_, other) in zip(sparse_layers(model), sparse_layers(plain)):
        torch.testing.assert_close(layer.theta(), other.theta(), rtol=1e-3, atol=1e-4, msg=name)
    torch._dynamo.reset()


def test_generation():
    model = make_sparse().eval()
    dense = densify(copy.deepcopy(model))
    for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, **settings}
        found = model.generate(TOKENS[:, :4], **settings)
        assert torch.equal(found, dense.generate(TOKENS[:, :4], **settings))


# What is refused


def test_the_weights_as_one_tensor_are_refused():
    layer = first_experts(make_sparse())[1]
    x = torch.randn(4, 3, 32)
    for function in (
        lambda: functional.linear(x, layer),
        lambda: torch.bmm(x, layer),  # it is not (experts, in, out)
        lambda: x @ layer,
        lambda: torch.stack([layer, layer]),
        lambda: torch.nn.init.normal_(layer),
        lambda: layer[torch.tensor([0, 1])],
        lambda: layer.transpose(0, 1),
        lambda: x @ layer[0],
        lambda: torch.bmm(layer.transpose(1, 2), x),
        lambda: layer[0] + 1 if hasattr(layer[0], "__add__") else torch.add(layer[0], 1),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"'(?!__eq).*' takes the weights of TopKastGroupedLinear\(experts=4.*one tensor.*densify\(model\)",
        ):
            function()


def test_products_by_the_place_of_the_parameter():
    for family in ("mixtral", "gpt_oss"):
        layer = first_experts(make_sparse(family))[1]
        x, weight = torch.randn(4, 3, 32), layer.weight.detach().clone()
        every = torch.bmm(x, layer) if layer.stores_transposed else torch.bmm(x, layer.transpose(1, 2))
        matrices = weight if layer.stores_transposed else weight.mT
        torch.testing.assert_close(every, torch.bmm(x, matrices))
        for expert in (2, -1, torch.tensor(1)):
            one = layer[expert]
            found = x @ one if layer.stores_transposed else functional.linear(x, one)
            torch.testing.assert_close(found, x @ matrices[expert])
    ones = torch.ones(96)
    layer = first_experts(make_sparse())[1]
    torch.testing.assert_close(functional.linear(x, layer[0], ones), functional.linear(x, layer[0]) + 1)
    torch.testing.assert_close(functional.linear(x, layer[0], bias=ones), functional.linear(x, layer[0]) + 1)


def test_the_implementation_is_not_for_dense_experts():
    model = make_family("mixtral")
    model.set_experts_implementation("topkast")
    with pytest.raises(ValueError, match="experts_implementation='topkast' is what sparsify gives.*MixtralExperts"):
        logits_of(model)
    assert ALL_EXPERTS_FUNCTIONS["topkast"] is topkast_experts_forward


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_a_dense_state_is_refused(family, strict):
    model = make_sparse(family)
    name, layer = first_experts(model)
    before = layer.theta()
    with pytest.raises(RuntimeError, match=re.escape(f"Layer '{name}' is sparse, but the state dict holds a dense")):
        model.load_state_dict(make_family(family, seed=1).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=re.escape(f"'{name}' is sparse")):
        copy.deepcopy(model).load_state_dict({name: torch.zeros(layer.stock_shape)}, strict=False)
    assert torch.equal(layer.theta(), before)


def test_blocks_that_do_not_fill_an_expert_are_refused():
    match = r"'model\.layers\.0\.mlp\.experts\.down_proj' has 4 experts of 32×48 \(out × in\).*blocks of 1×32 do not"
    with pytest.raises(ValueError, match=match):
        make_sparse(block_size=[1, 32])


def test_experts_spread_over_processes_are_refused():
    for attribute in ("_is_expert_parallel", "_is_hooked"):
        model = make_family("mixtral")
        setattr(model.model.layers[0].mlp.experts, attribute, True)
        with pytest.raises(
            ValueError, match=r"'model\.layers\.0\.mlp\.experts' is split.*exclude_modules=\['experts'\]"
        ):
            sparsify(model, density=0.3)
        sparsify(model, density=0.3, exclude_modules=["experts"])


def test_quantised_experts_are_refused():
    model = make_family("mixtral")
    for block in model.model.layers:
        stock = block.mlp.experts
        for key in ("gate_up_proj", "down_proj"):
            number = getattr(stock, key).detach()
            setattr(stock, key, nn.Parameter(number.to(torch.float8_e4m3fn), requires_grad=False))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts\.\w+_proj' \(4, .*not quantised"):
        sparsify(model, density=0.3)
    scaled = make_family("mixtral")
    for block in scaled.model.layers:
        block.mlp.experts.gate_up_proj_scale_inv = nn.Parameter(torch.ones(4, 2, 2))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*' \(4, .*exclude_modules=\['experts'\]"):
        sparsify(scaled, density=0.3)


def test_a_forward_of_its_own_and_a_computed_parameter_are_refused():
    model = make_family("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda *args: args[0]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts' has a forward of its own"):
        sparsify(model, density=0.3)
    del experts.forward
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj' is no parameter but computed"):
        sparsify(model, density=0.3)
    assert not list(sparse_layers(model))


def test_tied_experts_stay_dense_and_cannot_be_named():
    model = make_family("mixtral")
    first, second = (block.mlp.experts for block in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj', but its weight is tied"):
        sparsify(model, density=0.3, target_modules=["experts"])
    names = [name for name, _ in sparse_layers(sparsify(model, density=0.3))]
    assert len([name for name in names if "gate_up_proj" in name]) == 2
    assert not [name for name in names if "down_proj" in name]
    assert expert_stacks(model).keys() == {f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1)}


def test_transformers_does_not_draw_sparse_experts_anew():
    model = make_sparse()
    before = first_experts(model)[1].theta()
    model.init_weights()
    assert torch.equal(first_experts(model)[1].theta(), before)


def test_kinds():
    layer = first_experts(make_sparse())[1]
    assert isinstance(layer, TopKastLayer) and not isinstance(layer, nn.Linear | TopKastLinear)
    assert layer.stock_name("a.b") == "a.b" and layer.matrix_shape == (4 * 96, 32)


def lora(model, **targets):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_adapters_beside_sparse_experts():
    model = lora(make_sparse(), target_modules="all-linear")
    assert not [name for name, _ in model.named_parameters() if "experts" in name and "lora" in name]
    loss_of(model, TOKENS).backward()
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        lora(make_sparse(), target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="TopKastGroupedLinear.*is not supported"):
        lora(make_sparse(), target_modules=["gate_up_proj"])
    dense = lora(densify(make_sparse()), target_parameters=["mlp.experts.gate_up_proj"])
    loss_of(dense, TOKENS).backward()

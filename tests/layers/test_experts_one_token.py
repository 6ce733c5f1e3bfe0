"""The products of one token with its experts: to the same bits as those of many tokens, which are sorted by expert."""

import copy
import pickle

import pytest
import torch
from tiny_families import make_family
from torch.nn import functional

from hf_topkast import densify, sparsify


one_token = pytest.importorskip("hf_topkast.ops.one_token", exc_type=ImportError)

# Plain; transposed, with biases, gate and up in turn; without a gate; experts within a group of layers.
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"]


def make_experts(family="mixtral", **settings):
    """The first sparse experts module of a small model."""
    torch.manual_seed(0)
    model = sparsify(make_family(family), **{"density": 0.3, "target_modules": ["experts"], **settings})
    experts = next(module for module in model.modules() if hasattr(module, "has_gate"))
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return experts.eval()


def layers_of(experts):
    return [getattr(experts, key) for key in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")]


def token(experts, *chosen):
    """A token for these experts, or for two that are not in ascending order."""
    down = experts.down_proj
    x = torch.randn(1, down.out_features, dtype=down.values.dtype)
    index = torch.tensor([chosen or (3, 1)])
    return x, index, torch.rand(index.shape).to(x)


def takes_the_short_way(experts, *inputs):
    before = [layer._one_token for layer in layers_of(experts)]
    for layer in layers_of(experts):
        layer._one_token = None
    with torch.no_grad():
        experts(*inputs)
    found = [type(layer._one_token) for layer in layers_of(experts)]
    for layer, product in zip(layers_of(experts), before):
        layer._one_token = product
    assert found in ([type(None)] * 2, [one_token.ExpertsOfOneToken] * 2)
    return found[0] is one_token.ExpertsOfOneToken


def check(experts, *inputs):
    """That one token takes the short way, and equals what the general one gives with a graph."""
    inputs = inputs or token(experts)
    long = experts(*inputs).detach()
    with torch.no_grad():
        assert torch.equal(experts(*inputs), long)
    assert takes_the_short_way(experts, *inputs)
    return long


def dense_outputs(experts, x, index, weights):
    """Each chosen expert by its dense α."""
    layers = layers_of(experts)
    alphas = [layer.to_rows(layer.weight.detach()).unflatten(0, (layer.experts, -1)) for layer in layers]
    biases = [experts.gate_up_proj_bias, experts.down_proj_bias] if experts.has_bias else [None, None]
    y = torch.zeros_like(x)
    for expert, weight in zip(index[0].tolist(), weights[0]):
        if expert < layers[0].experts:
            first, second = (
                (alpha[expert], None if bias is None else bias[expert]) for alpha, bias in zip(alphas, biases)
            )
            row = functional.linear(x, *first)
            row = experts._apply_gate(row) if experts.has_gate else experts.act_fn(row)
            y = y + weight * functional.linear(row, *second)
    return y


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_products_of_many_and_the_dense_ones(family, count, threads):
    threads(count)
    experts = make_experts(family)
    for chosen in ((3, 1), (0, 2), (2,), (1, 0, 3, 2)):
        inputs = token(experts, *chosen)
        found = check(experts, *inputs)
        torch.testing.assert_close(found, dense_outputs(experts, *inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"block_size": [2, 4]}, {"density": 1.0}, {"backend": "cpu"}])
def test_settings(settings):
    check(make_experts(**settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_scattered_blocks(family):
    experts = make_experts(family, block_size=[4, 2], scatter_blocks=True)
    assert layers_of(experts)[1].row_stride != 1
    for chosen in ((3, 1), (1, 0, 3, 2)):
        inputs = token(experts, *chosen)
        torch.testing.assert_close(check(experts, *inputs), dense_outputs(experts, *inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_numbers_past_the_last_expert_give_nothing(family):
    experts = make_experts(family)
    count = layers_of(experts)[0].experts
    inputs = token(experts, count, 1)
    torch.testing.assert_close(check(experts, *inputs), dense_outputs(experts, *inputs), rtol=1e-4, atol=1e-5)
    if family == "mixtral":
        assert not check(experts, *token(experts, count, count + 3)).any()


def test_changes_in_place_count_and_so_do_other_sets():
    experts = make_experts("gpt_oss")
    first = check(experts, *(inputs := token(experts)))
    products = [layer._one_token for layer in layers_of(experts)]
    with torch.no_grad():
        layers_of(experts)[0].values.mul_(-2)
        experts.down_proj_bias.add_(1)
    assert not torch.equal(check(experts, *inputs), first)
    assert [layer._one_token for layer in layers_of(experts)] == products
    for share in (0.5, 0.02, 1.0):
        for layer in layers_of(experts):
            mask = torch.rand(layer.matrix_shape) < share
            layer.reassign(mask, mask)
        check(experts, *inputs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))])
def test_copies_read_their_own_weights(copied):
    experts = make_experts()
    expected = check(experts, *(inputs := token(experts)))
    other = copied(experts)
    with torch.no_grad():
        layers_of(experts)[0].values.zero_()
    assert torch.equal(check(other, *inputs), expected)


def test_not_with_gradients_several_tokens_autocast_another_backend_or_other_types():
    experts = make_experts("gpt_oss")
    inputs = token(experts)
    assert takes_the_short_way(experts, *inputs)
    assert not takes_the_short_way(experts, *(torch.cat([each, each]) for each in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_the_short_way(experts, *inputs)
    for layer in layers_of(experts):
        layer.backend = "reference"
        assert not takes_the_short_way(experts, *inputs)
        layer.backend = "auto"
    experts.down_proj_bias.data = experts.down_proj_bias.data.double()
    assert not experts.down_proj.for_one_token().takes(experts.down_proj_bias)
    assert experts(*inputs).isfinite().all()
    half = make_experts("gpt_oss").to(torch.bfloat16)
    assert not takes_the_short_way(half, *token(half))
    experts = make_experts()
    experts(*token(experts)).sum().backward()
    assert layers_of(experts)[0]._one_token is None


def test_one_dense_parameter_beside_a_sparse_one():
    experts = make_experts(target_modules=["down_proj"])
    inputs = token(experts)
    with torch.no_grad():
        found = experts(*inputs)
    assert experts.down_proj._one_token is None
    torch.testing.assert_close(found, experts(*inputs))


def test_who_wants_to_see_the_layer_called_does():
    experts = make_experts()
    inputs = token(experts)
    for register in (experts.down_proj.register_forward_pre_hook, experts.gate_up_proj.register_forward_hook):
        seen = []
        handle = register(lambda *args, seen=seen: seen.append(args))
        with torch.no_grad():
            experts(*inputs)
        assert len(seen) == 1
        handle.remove()
    check(experts, *inputs)


def test_an_input_that_does_not_fit_is_refused():
    product = layers_of(make_experts())[0].for_one_token()
    chosen = torch.tensor([2, 1])
    for x in (torch.randn(1, 31), torch.randn(3, 32), torch.randn(32), torch.randn(1, 32).double()):
        with pytest.raises(ValueError, match="not that of one token for 2 sparse experts of 32 inputs"):
            product(x, chosen, None)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_one_token_at_a_time(family):
    model = sparsify(make_family(family), density=0.3).eval()
    experts = model.model.layers[0].mlp.experts
    settings = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    prompt = torch.tensor([[5, 9, 2]])
    found = model.generate(prompt, **settings)
    assert all(isinstance(layer._one_token, one_token.ExpertsOfOneToken) for layer in layers_of(experts))
    assert torch.equal(found, densify(copy.deepcopy(model)).generate(prompt, **settings))


def test_a_compiled_module():
    experts = make_experts()
    inputs = token(experts)
    expected = check(experts, *inputs)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(experts(*inputs), expected)

import copy

import pytest
import torch
from toy_models import make_gpt2, make_llama, token_batches

from hf_topkast import densify, sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.surgery.correction import corrected


def problem(out_features=12, in_features=200, tokens=600, density=0.4):
    """A layer with correlated inputs, in float64: weights, those that stay, inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(in_features // 3, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, in_features // 3, generator=generator, dtype=torch.float64) @ mix
    x += torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    keep = torch.rand(weight.shape, generator=generator) < density
    return weight, keep, x


def error(weight, others, x):
    return float(((weight - others) @ x.T).square().sum())


def test_a_sweep_by_columns_written_out():
    weight, keep, x = problem(in_features=9)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    expected = weight.clone()
    inverse = damped.inverse()
    for column in range(9):  # optimal brain surgeon: remove one weight, move those that are still to come
        left = list(range(column, 9))
        off = expected[:, column] * ~keep[:, column]
        direction = inverse[0] / inverse[0, 0]
        expected[:, left] -= off[:, None] * direction
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    found = corrected(weight, keep, gram)
    torch.testing.assert_close(found[keep], expected[keep])
    assert torch.equal(found[~keep], weight[~keep])


@pytest.mark.parametrize(("density", "factor"), [(0.2, 0.9), (0.5, 0.65), (0.8, 0.6)])
def test_outputs_come_nearer(density, factor):
    weight, keep, x = problem(density=density)
    cut = error(weight, weight * keep, x)
    after = error(weight, corrected(weight, keep, x.T @ x) * keep, x)
    least = 0.0
    for row, mask in zip(weight, keep):  # no weights that stay can do better than these
        solution = torch.linalg.lstsq(x[:, mask], x @ row).solution
        least += float((x @ row - x[:, mask] @ solution).square().sum())
    assert least <= after < factor * cut


def test_nothing_to_make_up_for_changes_nothing():
    weight, keep, x = problem()
    assert torch.equal(corrected(weight, torch.ones_like(keep), x.T @ x), weight)
    assert torch.equal(corrected(weight, torch.zeros_like(keep), x.T @ x), weight)


@pytest.mark.parametrize("make_model", [make_gpt2, make_llama])
def test_a_model_keeps_its_sets_and_what_lies_outside_a(make_model):
    batches = token_batches(4)
    plain, better, dense = (make_model(dtype=torch.float64) for _ in range(3))
    sparsify(plain, density=0.5, calibration=batches)
    sparsify(better, density=0.5, calibration=iter(batches), correct=True)
    for (name, one), (_, two) in zip(sparse_layers(plain), sparse_layers(better), strict=True):
        active = one.pattern.active_mask()
        assert torch.equal(active, two.pattern.active_mask())
        assert torch.equal(one.theta()[~active], two.theta()[~active])
        assert not torch.equal(one.theta()[active], two.theta()[active]), name
        assert two.input_norms is not None

    def distance(model):
        with torch.no_grad():
            return sum(float((model(t).logits - dense(t).logits).square().mean()) for t in batches)

    assert distance(densify(better)) < 0.9 * distance(densify(plain))


def test_each_block_is_corrected_for_the_inputs_that_sparse_blocks_give_it():
    batches = token_batches(2)
    model = make_llama(dtype=torch.float64)
    dense = copy.deepcopy(model)
    sparsify(model, density=0.4, calibration=batches, correct=True)
    name = "model.layers.1.mlp.gate_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    # As when that block was taken: the first one sparse, itself still dense.
    last = model.model.layers[1]
    model.model.layers[1] = dense.model.layers[1]
    hook.remove()
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for tokens in batches:
            model.eval()(tokens)
    x = torch.cat(seen)
    layer = last.mlp.gate_proj
    active = layer.pattern.active_mask()
    expected = corrected(dense.get_submodule(name).weight.detach(), active, x.T @ x)
    torch.testing.assert_close(layer.theta(), expected)


def test_without_calibration_it_is_refused():
    model = make_gpt2()
    with pytest.raises(ValueError, match="correct=True.*calibration=...: give batches"):
        sparsify(model, density=0.5, correct=True)
    assert not list(sparse_layers(model))


@pytest.mark.parametrize(
    "settings", [{"density": 0.5, "initial_density": 1.0}, {"density": 0.5, "method": "dpf"}, {"density": "nonzero"}]
)
def test_where_nothing_goes_it_is_refused(settings):
    model = make_llama()
    model.model.layers[0].mlp.up_proj.weight.data[:5] = 0
    with pytest.raises(ValueError, match=r"correct=True.* with (initial_density=1|density='nonzero') it takes none"):
        sparsify(model, calibration=token_batches(1), correct=True, **settings)
    assert not list(sparse_layers(model))


def test_inputs_that_are_all_zero_change_nothing():
    weight, keep, _ = problem(in_features=9)
    assert torch.equal(corrected(weight, keep, torch.zeros(9, 9, dtype=torch.float64)), weight)

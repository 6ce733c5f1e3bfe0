import pytest
import torch
from toy_models import make_gpt2

from hf_topkast import TopKastConfig, sparsify
from hf_topkast.sets.plan import SetPlan, match_overrides
from hf_topkast.surgery import sparse_layers


SHAPES = {"a.fc": (6, 10), "b.fc": (6, 10), "b.out": (10, 6)}


def make_plan(**settings):
    return SetPlan(torch.nn.Module(), SHAPES, TopKastConfig(**{"density": 0.2, **settings}))


def weights(name, place=0):
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return torch.randn(SHAPES[name], generator=generator) * (1 + ord(name[0]) - ord("a"))


def test_uniform_sizes():
    assert make_plan().sizes(0.0, True, weights) == {name: [(12, 24)] for name in SHAPES}
    assert make_plan().sizes(0.0, False, weights) == {name: [(12, 12)] for name in SHAPES}
    assert make_plan(initial_density=0.8).sizes(0.5, True, weights) == {name: [(30, 60)] for name in SHAPES}


def test_overrides_take_layers_out_of_the_distribution():
    plan = make_plan(density_overrides={r"a\..*": 0.5, r".*\.fc": 0.1})
    assert plan.sizes(0.0, True, weights) == {"a.fc": [(30, 60)], "b.fc": [(6, 12)], "b.out": [(12, 24)]}
    plan = make_plan(density_overrides={r"a\..*": 0.05}, distribution="global")
    sizes = plan.sizes(0.0, True, weights)
    assert sizes["a.fc"] == [(3, 6)]
    assert [sum(sizes[name][0][place] for name in ("b.fc", "b.out")) for place in (0, 1)] == [24, 48]
    everything = make_plan(density_overrides={r".*": 0.3}, distribution="erdos_renyi")
    assert everything.sizes(0.0, True, weights) == {name: [(18, 36)] for name in SHAPES}


def test_overrides_are_scheduled_to_their_own_density():
    plan = make_plan(density_overrides={r"a\..*": 0.4}, initial_density=0.6, backward_density=0.3)
    assert plan.sizes(1.0, True, weights) == {name: [(36, 54)] for name in SHAPES}
    assert plan.sizes(0.5, True, weights) == {"a.fc": [(30, 45)], "b.fc": [(24, 36)], "b.out": [(24, 36)]}


def test_erdos_renyi_shares_out_blocks_as_it_shares_out_weights():
    plain, blocks = (make_plan(distribution="erdos_renyi", block_size=size) for size in ([1, 1], [1, 2]))
    assert plain.sizes(0.0, True, weights) == {name: [(12, 24)] for name in SHAPES}
    assert blocks.sizes(0.0, True, weights) == {name: [(6, 12)] for name in SHAPES}


def test_erdos_renyi_sizes_of_some_layers_are_those_that_they_have_among_all():
    shapes = {**SHAPES, "b.out": (12, 20)}
    settings = {"density": 0.2, "distribution": "erdos_renyi", "density_overrides": {"a.fc": 0.5}}
    plan = SetPlan(torch.nn.Module(), shapes, TopKastConfig(**settings))
    whole = plan.sizes(0.0, True, weights)
    assert plan.sizes(0.0, True, weights, ["b.fc"]) == {"b.fc": whole["b.fc"]} != {"b.fc": [(12, 24)]}
    assert plan.sizes(0.0, True, weights, ["a.fc", "b.out"]) == {name: whole[name] for name in ("a.fc", "b.out")}


def test_dpf_has_everything_in_b_whatever_the_densities():
    plan = make_plan(method="dpf", density_overrides={r"a\..*": 0.05}, initial_density=0.1)
    for left, sizes in ((1.0, (6, 6)), (0.0, (3, 12))):
        a, *b = ([(size, 60)] for size in (*sizes, sizes[1]))
        assert plan.sizes(left, True, weights) == dict(zip(SHAPES, (a, *b)))


def test_first_matching_override_counts():
    assert match_overrides({".*fc": 0.5, "b.*": 0.1}, SHAPES) == {"a.fc": 0.5, "b.fc": 0.5, "b.out": 0.1}


@pytest.mark.parametrize("pattern", ["fc", r"c\..*", r".*\.fcc"])
def test_override_of_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match=r"density_overrides: .* matches the whole name of no layer.*a\.fc"):
        make_plan(density_overrides={r".*\.fc": 0.5, pattern: 0.1})


def test_rounding_never_makes_b_smaller_than_a():
    shapes = {"a": (6, 10), "b": (6, 10), "c": (6, 4)}
    config = TopKastConfig(density=6 / 144, backward_density=7 / 144, distribution="erdos_renyi")
    sizes = SetPlan(torch.nn.Module(), shapes, config).sizes(0.0, True, weights)
    assert sizes == {"a": [(2, 3)], "b": [(2, 3)], "c": [(2, 2)]}  # by itself B would have 1 of c


def test_sets_are_the_global_prefix():
    plan = make_plan(distribution="global")
    sizes = plan.sizes(0.0, True, weights)
    chosen = {name: plan.choose(name, weights(name), sizes[name]) for name in SHAPES}
    active = torch.cat([weights(name)[chosen[name][0]].abs() for name in SHAPES])
    rest = torch.cat([weights(name)[~chosen[name][0]].abs() for name in SHAPES])
    assert len(active) == 36 and active.min() > rest.max()
    assert sizes["a.fc"][0][0] < sizes["b.fc"][0][0]


def test_blocks_are_counted_like_weights():
    plan = make_plan(block_size=(2, 2), density=0.4)
    assert plan.sizes(0.0, True, weights) == {name: [(6, 12)] for name in SHAPES}
    active, backward = plan.choose("a.fc", weights("a.fc"), [(6, 12)])
    assert int(active.sum()) == 24 and int(backward.sum()) == 48


def test_block_across_two_parts_is_refused():
    sparsify(make_gpt2(), density=0.2, split_fused=True, block_size=(8, 1))
    with pytest.raises(ValueError, match=r"18 rows of layer 'transformer\.h\.0\.attn\.c_attn' would lie in two"):
        sparsify(make_gpt2(), density=0.2, split_fused=True, block_size=(18, 1), target_modules=["c_attn"])


def pruned_gpt2(kept=0.3):
    """A GPT-2 with other shares of zeros in its layers."""
    model = make_gpt2()
    with torch.no_grad():
        for place, (name, weight) in enumerate(model.named_parameters()):
            if ".c_" in name and name.endswith("weight"):
                count = round(weight.numel() * min(1, kept + 0.02 * place))
                threshold = weight.abs().flatten().kthvalue(weight.numel() - count + 1).values
                weight[weight.abs() < threshold] = 0
    return model


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, lambda active: min(1, 2 * active)),
        ({"method": "static"}, lambda active: active),
        ({"backward_density": 0.4}, lambda active: max(0.4, active)),
    ],
    ids=["twice", "static", "backward"],
)
@pytest.mark.parametrize("kept", [0.3, 0.5])
def test_nonzero_takes_the_sets_of_a_pruned_model(settings, share, kept):
    model = pruned_gpt2(kept)
    before = {name: module.weight.detach().clone() for name, module in model.named_modules() if ".c_" in name}
    sparsify(model, density="nonzero", **settings)
    for name, layer in sparse_layers(model):
        assert torch.equal(layer.weight, before[name]) and torch.equal(layer.active_mask, before[name] != 0)
        assert layer.values.numel() == pytest.approx(share(layer.density) * layer.numel, abs=1)
    assert len({round(layer.density, 2) for _, layer in sparse_layers(model)}) > 4


def test_exploration_of_a_pruned_model_is_all_over_the_layer():
    model = sparsify(pruned_gpt2(kept=0.1), density="nonzero")
    for _, layer in sparse_layers(model):
        exploration = layer.backward_mask & ~layer.active_mask
        halves = [int(half.sum()) for half in layer.to_rows(exploration).chunk(2)]
        assert max(halves) < 1.4 * min(halves)


def test_nonzero_needs_zeros_and_others():
    with pytest.raises(ValueError, match="density='nonzero' takes the zeros of a pruned model.*hold none"):
        sparsify(make_gpt2(), density="nonzero")
    model = pruned_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.zero_()
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp\.c_fc' holds only zeros.*exclude_modules"):
        sparsify(model, density="nonzero")
    assert not list(sparse_layers(model))
    model = pruned_gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 24:48] = 0
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' has a part that holds only zeros"):
        sparsify(model, density="nonzero", split_fused=True)

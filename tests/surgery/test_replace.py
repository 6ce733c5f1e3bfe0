import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_models import make_gpt2, make_llama, token_batches

from hf_topkast import TopKastConfig, densify, sparsify
from hf_topkast.layers.linear import TopKastConv1D, TopKastLinear
from hf_topkast.method import METHODS, Method
from hf_topkast.sets.selection import top_mask
from hf_topkast.surgery import replace, sparse_info, sparse_layers


def names(model):
    return [name for name, _ in sparse_layers(model)]


def test_default_targets_are_the_projections_of_the_blocks():
    gpt2 = sparsify(make_gpt2(), density=0.2)
    leaves = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(gpt2) == [f"transformer.h.{block}.{leaf}" for block in range(2) for leaf in leaves]
    assert all(isinstance(layer, TopKastConv1D) for _, layer in sparse_layers(gpt2))

    llama = sparsify(make_llama(), density=0.2)
    leaves = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert sorted(names(llama)) == sorted(f"model.layers.{block}.{leaf}" for block in range(2) for leaf in leaves)
    assert all(isinstance(layer, TopKastLinear) for _, layer in sparse_layers(llama))


def test_sizes_and_config(make_model):
    config = TopKastConfig(density=0.1, backward_density=0.3)
    model = make_model()
    assert sparsify(model, config) is model
    assert sparse_info(model).config == config and sparse_info(model).step == 0
    assert sparse_info(model).config is not config  # so that two models may be made with one
    for _, layer in sparse_layers(model):
        assert layer.active_count == max(1, round(0.1 * layer.numel))
        assert layer.values.numel() == round(0.3 * layer.numel)


def test_densify_computes_the_same(make_model):
    model = sparsify(make_model(), density=0.2)
    tokens = token_batches(1)[0]
    expected = model(tokens).logits
    kinds = {name: type(module) for name, module in make_model().named_modules()}
    assert densify(model) is model
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)  # in other memory, on some CPUs
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    sparsify(model, density=0.2)  # and it can be made sparse again


def test_blocks_that_do_not_fill_a_layer_are_refused():
    settings = {"density": 0.2, "block_size": (16, 1)}
    check_refused(make_gpt2(), lambda model: sparsify(model, **settings), r"h\.0\.attn\.c_attn'|c_proj' is 24×24")
    model = sparsify(make_gpt2(), **settings, exclude_modules=["c_attn", "c_proj"])
    for _, layer in sparse_layers(model):
        members = layer.pattern.active_mask().view(-1, 16, layer.pattern.shape[1])
        assert torch.equal(members.all(1), members.any(1))
        assert layer.active_count == 16 * round(0.2 * layer.numel / 16)


def test_densify_needs_a_model():
    with pytest.raises(TypeError, match="densify takes a model that is loaded.*'gpt2'"):
        densify("gpt2")


def test_densify_needs_a_sparse_model():
    with pytest.raises(ValueError, match="no sparse layer"):
        densify(make_gpt2())


def test_full_density_changes_nothing(make_model):
    model, tokens = make_model(), token_batches(1)[0]
    expected = model(tokens).logits
    torch.testing.assert_close(sparsify(model, density=1.0)(tokens).logits, expected)


@pytest.mark.parametrize(
    ("target", "excluded", "expected"),
    [
        (["c_fc"], None, ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]),
        (["mlp.c_proj"], ["h.0.mlp.c_proj"], ["transformer.h.1.mlp.c_proj"]),
        (r".*h\.1\.attn\..*", None, ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]),
        (None, r".*(attn|h\.0).*", ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
    ],
)
def test_rules_for_names(target, excluded, expected):
    model = sparsify(make_gpt2(), density=0.5, target_modules=target, exclude_modules=excluded)
    assert names(model) == expected


def test_all_linear_spares_the_head():
    model = sparsify(make_llama(), density=0.2, target_modules="all-linear")
    assert "lm_head" not in names(model) and len(names(model)) == 14


def test_any_module_with_targets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(model, density=0.25, target_modules=["0"])
    assert names(model) == ["0"]


def test_routers_stay_dense():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared_expert_gate, self.gate_proj = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)

    model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    assert names(sparsify(model, density=0.5)) == ["layers.0.gate_proj"]


def test_a_module_in_two_places_becomes_one_layer():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"layers": nn.ModuleList([shared, nn.Linear(6, 6), shared])})
    sparsify(model, density=0.5)
    assert model["layers"][0] is model["layers"][2]
    assert isinstance(model["layers"][0], TopKastLinear)
    assert names(model) == ["layers.0", "layers.1"]


def check_refused(model, act, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        act(model)
    assert names(model) == []
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) or before[key].isnan().any() for key in before)


def test_no_match_lists_candidates():
    check_refused(
        make_gpt2(),
        lambda model: sparsify(model, density=0.2, target_modules=["query"]),
        r"matches \['query'\].*Candidates: transformer\.h\.0\.attn\.c_attn",
    )
    check_refused(nn.Sequential(nn.ReLU()), lambda model: sparsify(model, density=0.2), "no nn.Linear and no Conv1D")
    model = nn.Sequential(nn.Linear(4, 4))
    check_refused(model, lambda model: sparsify(model, density=0.2), "say which in target_modules. Candidates: 0")


@pytest.mark.parametrize("target", [["wte"], ["ln_1"], ["mlp"], r".*\.ln_1"])
def test_unsupported_type_is_refused_by_name(target):
    check_refused(
        make_gpt2(),
        lambda model: sparsify(model, density=0.2, target_modules=target),
        "target_modules names 'transformer.*cannot be made sparse",
    )


def test_tied_weight_is_refused_by_name():
    check_refused(
        make_gpt2(), lambda model: sparsify(model, density=0.2, target_modules=["lm_head"]), "'lm_head'.*is tied"
    )


def test_what_is_no_setting_and_no_model_is_named():
    with pytest.raises(TypeError, match="no setting 'sparsity'.*Did you mean.*density.*TopKastConfig"):
        sparsify(make_gpt2(), sparsity=0.8)
    with pytest.raises(TypeError, match="takes a model that is loaded.*'gpt2'"):
        sparsify("gpt2", density=0.2)


def test_sparsify_twice_is_refused():
    model = sparsify(make_gpt2(), density=0.2)
    with pytest.raises(ValueError, match="sparse already.*densify"):
        sparsify(model, density=0.1)


def test_nan_weight_is_refused_by_layer():
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    check_refused(model, lambda model: sparsify(model, density=0.2), r"'transformer\.h\.1\.mlp\.c_fc': 1 of its")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("rule", [["c_fc", "c_fcc"], r".*\.c_fcc"])
def test_misspelt_name_is_refused_beside_others(field, rule):
    check_refused(make_gpt2(), lambda model: sparsify(model, **{field: rule}), f"{field}=.*c_fcc.*Candidates")


def test_everything_excluded_is_refused():
    check_refused(
        make_gpt2(),
        lambda model: sparsify(model, density=0.2, exclude_modules=["c_attn", "c_proj", "c_fc"]),
        "is left",
    )


def test_single_layer_is_refused():
    with pytest.raises(ValueError, match="a single Linear.*nn.Sequential"):
        sparsify(nn.Linear(8, 8), density=0.2, target_modules="all-linear")


def test_weights_that_are_not_loaded_are_refused():
    with torch.device("meta"):
        model = make_gpt2()
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' .*meta device"):
        sparsify(model, density=0.2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_cannot_be_trained_are_refused(dtype):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"'0' has weights of {dtype}.*float32.*exclude_modules"):
        sparsify(model, density=0.2, target_modules=["0"])


def test_weights_that_lie_elsewhere_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data = torch.empty(0)  # as DeepSpeed leaves them
    with pytest.raises(ValueError, match="'0' is empty: sparsify the whole model"):
        sparsify(model, density=0.2, target_modules=["0"])


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_is_wrapped_is_refused(one_process):
    for verb, make in (
        (lambda model: sparsify(model, density=0.2, target_modules=["c_fc"]), make_gpt2),
        (densify, lambda: sparsify(make_gpt2(), density=0.2)),
    ):
        with pytest.raises(ValueError, match="DistributedDataParallel has taken over. Call it before"):
            verb(DistributedDataParallel(make()))
        model = make()
        fully_shard(model.transformer.h[0])
        with pytest.raises(ValueError, match=r"taken over in 'transformer\.h\.0'"):
            verb(model)
    sharded = make_gpt2()
    fully_shard(sharded.transformer.h[0])
    layers = nn.Sequential(sharded.transformer.h[0].mlp.c_fc)  # a part that is no wrapper itself
    with pytest.raises(ValueError, match="'0' is split over processes"):
        sparsify(layers, density=0.2, target_modules=["0"])


def test_parts_with_settings_of_their_own_are_refused_in_training():
    model = make_gpt2()
    for block, density in zip(model.transformer.h, (0.1, 0.5)):
        sparsify(block, density=density, target_modules="all-linear")
    with pytest.raises(ValueError, match="by 2 calls of sparsify"):
        sparse_info(model)


def test_a_part_of_a_model_is_enough():
    model = make_gpt2()
    sparsify(model.transformer, density=0.2)
    assert sparse_info(model) is sparse_info(model.transformer)


def test_a_method_that_fails_at_a_later_layer_leaves_the_model_as_it_was(monkeypatch):
    seen = []

    def fail(view):
        seen.append(view)
        return top_mask(view.theta.abs(), view.size if len(seen) < 5 else 0)

    monkeypatch.setitem(METHODS, "failing", Method(fail))
    check_refused(make_gpt2(), lambda model: sparsify(model, density=0.2, method="failing"), "method='failing' gave")
    assert len(seen) == 5


def test_dense_layers_are_freed_one_by_one(monkeypatch):
    model = make_gpt2()
    dense = [weakref.ref(module) for module in model.modules() if type(module).__name__ == "Conv1D"]
    alive = []

    def watch(*args):
        alive.append(sum(reference() is not None for reference in dense))
        return made(*args)

    made = replace.make_sparse
    monkeypatch.setattr(replace, "make_sparse", watch)
    sparsify(model, density=0.2)
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]


def test_config_and_settings_exclude_each_other():
    check_refused(make_gpt2(), lambda model: sparsify(model, TopKastConfig(), density=0.2), "not both.*density")


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.0},
        {"density": 2},
        {"density": 0.5, "backward_density": 0.4},
        {"method": "lottery"},
        {"backend": "tpu"},
        {"density_overrides": {"c_fc": 0.5}},
    ],
)
def test_bad_settings_leave_the_model_as_it_was(settings):
    check_refused(make_gpt2(), lambda model: sparsify(model, **settings), list(settings)[-1])

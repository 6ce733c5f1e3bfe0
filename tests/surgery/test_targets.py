import pytest
import torch
from tiny_families import make_family
from torch import nn
from toy_models import make_llama

from hf_topkast import sparsify
from hf_topkast.layers.linear import TopKastLinear, sparse_type
from hf_topkast.surgery import sparse_layers


class SameAsLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(), self.bias)


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))


class TopTwo(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(3, 5, self.in_features))


def test_a_subclass_that_computes_the_same_is_a_projection():
    torch.manual_seed(0)
    assert sparse_type(SameAsLinear(8, 6)) is TopKastLinear
    model = nn.ModuleDict({"layers": nn.ModuleList([SameAsLinear(8, 6)])})
    layer = model["layers"][0]
    x = torch.randn(3, 8)
    expected = layer(x)
    sparsify(model, density=1.0)
    torch.testing.assert_close(model["layers"][0](x), expected)


@pytest.mark.parametrize("kind", [Rounded, Scaled, TopTwo, Grouped])
def test_a_subclass_that_does_something_else_is_none(kind):
    assert sparse_type(kind(8, 6)) is None
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 6), kind(8, 6)])})
    assert [name for name, _ in sparse_layers(sparsify(model, density=0.5))] == ["layers.0"]


def test_sparse_layers_are_no_targets():
    model = sparsify(make_llama(), density=0.5)
    assert all(sparse_type(layer) is None for _, layer in sparse_layers(model))


@pytest.mark.parametrize("rule", [None, "all-linear"])
def test_experts_are_targets(rule):
    names = [name for name, _ in sparse_layers(sparsify(make_family("mixtral"), density=0.2, target_modules=rule))]
    assert len(names) == 12
    assert [name.split(".", 3)[-1] for name in names[4:6]] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    kept = sparsify(make_family("mixtral"), density=0.2, target_modules=rule, exclude_modules=["experts"])
    assert len(list(sparse_layers(kept))) == 8


def test_named_targets_need_no_exclusion():
    model = sparsify(make_family("recurrent_gemma"), density=0.2, target_modules=["q_proj"])
    assert len(list(sparse_layers(model))) == 1


@pytest.mark.parametrize(
    "rule, leaves",
    [
        (["experts"], {"gate_up_proj", "down_proj"}),
        (["experts.down_proj"], {"down_proj"}),
        (["gate_up_proj"], {"gate_up_proj"}),
        (r".*experts", {"gate_up_proj", "down_proj"}),
        (r".*\.1\.mlp\.experts\.down_proj", {"down_proj"}),
    ],
)
def test_experts_are_named_by_their_parameter_or_their_module(rule, leaves):
    names = [name for name, _ in sparse_layers(sparsify(make_family("mixtral"), density=0.2, target_modules=rule))]
    assert {name.rpartition(".")[2] for name in names} == leaves
    rest = sparsify(make_family("mixtral"), density=0.2, exclude_modules=rule)
    assert not {name for name, _ in sparse_layers(rest)} & set(names)


@pytest.mark.parametrize(
    "family, match",
    [
        ("recurrent_gemma", r"rg_lru\.recurrent_gate_weight' \(4, .*exclude_modules=\['rg_lru'\]"),
        ("xlnet", r"exclude_modules=\['rel_attn'\]"),
    ],
)
def test_other_stacks_are_refused_by_name(family, match):
    model = make_family(family)
    with pytest.raises(ValueError, match=match):
        sparsify(model, density=0.2)
    assert not list(sparse_layers(model))


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "jetmoe", "longcat_flash", "zaya"])
def test_all_of_a_router_stays_dense(family):
    names = [name for name, _ in sparse_layers(sparsify(make_family(family), density=0.2))]
    assert names and not [name for name in names if {"gate", "router"} & set(name.split("."))]


def test_convolutions_and_small_vectors_are_no_experts():
    for family in ("mamba", "rwkv"):
        assert list(sparse_layers(sparsify(make_family(family), density=0.2)))


@pytest.mark.parametrize("family", ["gemma3", "git"])
def test_towers_stay_dense(family):
    model = make_family(family)
    assert any("vision" in name for name, _ in model.named_modules())
    names = [name for name, _ in sparse_layers(sparsify(model, density=0.2))]
    assert names and not any("vision" in name for name in names)

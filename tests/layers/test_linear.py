import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from toy_models import choose_sets
from transformers.pytorch_utils import Conv1D

from hf_topkast.layers.linear import TopKastConv1D, TopKastLinear
from hf_topkast.ops import BACKENDS
from hf_topkast.storage import Pattern


def make_linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(10, 7, bias=bias)


def make_conv1d():
    torch.manual_seed(0)
    return Conv1D(7, 10)


def rows(dense):
    weight = dense.weight.detach()
    return weight.T.contiguous() if isinstance(dense, Conv1D) else weight


def make_sparse(dense, density=0.2, backward_density=0.5, **settings):
    kind = TopKastConv1D if isinstance(dense, Conv1D) else TopKastLinear
    return kind(dense, *choose_sets(rows(dense), density, backward_density), **settings)


KINDS = {"linear": make_linear, "no bias": lambda: make_linear(bias=False), "conv1d": make_conv1d}


@pytest.fixture(params=KINDS)
def dense(request):
    return KINDS[request.param]()


def test_views_are_in_the_stock_layout(dense):
    layer = make_sparse(dense)
    active, backward = choose_sets(rows(dense), 0.2, 0.5)
    if isinstance(dense, Conv1D):
        active, backward = active.T, backward.T
    assert torch.equal(layer.active_mask, active)
    assert torch.equal(layer.backward_mask, backward)
    assert torch.equal(layer.weight, dense.weight * active)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert (layer.density, layer.backward_density) == (14 / 70, 35 / 70)


def test_tools_find_the_layer_by_its_stock_type(dense):
    layer = make_sparse(dense)
    assert isinstance(layer, type(dense))
    for name in ("in_features", "out_features", "nx", "nf"):
        assert getattr(layer, name, None) == getattr(dense, name, None)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"][: 1 + (dense.bias is not None)]


def test_forward_equals_the_masked_dense_layer(dense):
    layer, x = make_sparse(dense), torch.randn(2, 3, 10)
    with torch.no_grad():
        dense.weight.mul_(layer.active_mask)
    torch.testing.assert_close(layer(x), dense(x))


def test_stored_numbers(dense):
    layer = make_sparse(dense)
    layer(torch.randn(4, 10)).sum().backward()
    assert layer.values.shape == layer.values.grad.shape == layer.columns.shape == (35,)
    assert layer.reservoir.numel() == 70 - 35
    assert layer.columns.dtype == torch.int16
    assert max(tensor.numel() for tensor in [*layer.parameters(), *layer.buffers()]) == 35


def test_weight_is_read_only(dense):
    layer = make_sparse(dense)
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros_like(layer.weight)
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(layer.weight.clone())
    for write in (nn.init.normal_, Tensor.zero_):
        with pytest.raises(RuntimeError, match="writes to the weight of a sparse layer.*densify"):
            write(layer.weight)


def test_reassign_keeps_the_parameter_and_every_weight(dense):
    layer = make_sparse(dense)
    values, theta = layer.values, layer.theta()
    layer(torch.randn(4, 10)).sum().backward()
    gradient = torch.zeros(70)
    gradient[layer.pattern.flat_index()] = values.grad
    active, backward = choose_sets(torch.rand(7, 10), 0.2, 0.5)
    layer.reassign(active, backward)
    assert layer.values is values
    assert torch.equal(values.grad, gradient[layer.pattern.flat_index()])  # 0 of what was not stored
    assert torch.equal(layer.theta(), theta)
    assert torch.equal(layer.pattern.active_mask(), active)
    assert torch.equal(layer.pattern.backward_mask(), backward)


def test_reassign_to_fewer_weights_gives_memory_back(dense):
    layer = make_sparse(dense)
    values, theta, active = layer.values, layer.theta(), layer.pattern.active_mask()
    layer.reassign(active, active)
    assert layer.values is values
    assert values.numel() == layer.columns.numel() == 14
    assert values.untyped_storage().nbytes() == 14 * 4
    assert layer.reservoir.numel() == 70 - 14
    assert torch.equal(layer.theta(), theta)


def test_the_size_of_a_is_read_off_once_for_each_choice_of_the_sets(dense, monkeypatch):
    reads = []
    monkeypatch.setattr(Pattern, "active", property(lambda self: reads.append(1) or int(self.row_offsets[7])))
    layer, other = make_sparse(dense), make_sparse(dense, density=0.3)
    reads.clear()
    assert (layer.active_count, layer.active_count, other.active_count) == (14, 14, 21)
    assert len(reads) == 2
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        clone.load_state_dict(other.state_dict())
        assert (clone.active_count, layer.active_count) == (21, 14)
    layer.reassign(*choose_sets(rows(dense), 0.1, 0.5))
    assert layer.active_count == layer.active_mask.sum() == 7


def test_reservoir_use_counts_first_visits_to_a(dense):
    layer = make_sparse(dense)
    assert layer.reservoir_use == 0
    reservoir = ~layer.pattern.backward_mask()
    visitors = torch.zeros_like(reservoir)
    visitors.view(-1)[reservoir.flatten().nonzero()[:7]] = True
    start = layer.pattern.active_mask(), layer.pattern.backward_mask()
    layer.reassign(visitors, visitors)
    layer.reassign(*start)
    layer.reassign(visitors, visitors)
    assert layer.reservoir_use == pytest.approx(7 / 35)


def test_state_dict_is_complete(dense):
    layer = make_sparse(dense)
    other = make_sparse(copy.deepcopy(dense))
    with torch.no_grad():
        layer.values.add_(1.0)
    layer.reassign(*choose_sets(torch.rand(7, 10), 0.1, 0.3))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.theta(), layer.theta())
    assert torch.equal(other.active_mask, layer.active_mask)
    assert torch.equal(other.backward_mask, layer.backward_mask)
    assert other.reservoir_use == layer.reservoir_use


@pytest.mark.parametrize("backward_density", [0.3, 0.5])
def test_training_goes_on_after_a_change_in_inference_mode(dense, backward_density):
    layer, other = make_sparse(dense), make_sparse(dense, density=0.1, backward_density=backward_density)
    with torch.inference_mode():
        layer.load_state_dict(other.state_dict())
        layer.reassign(*choose_sets(torch.rand(7, 10), 0.1, backward_density + 0.1))
    layer(torch.randn(2, 10)).sum().backward()
    assert layer.values.grad.shape == layer.values.shape


def test_dense_state_dict_is_refused_even_when_not_strict(dense):
    layer = make_sparse(dense)
    with pytest.raises(RuntimeError, match="is sparse, but the state dict holds a dense.*from_pretrained"):
        nn.ModuleDict({"fc": layer}).load_state_dict({"fc.weight": dense.weight}, strict=False)


@pytest.mark.parametrize("key", ["values", "columns", "reservoir", "row_offsets"])
def test_inconsistent_state_dict_is_refused(dense, key):
    layer = make_sparse(dense)
    state = layer.state_dict()
    state[key] = state[key][:-1].clone()
    with pytest.raises(RuntimeError, match="Layer"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(dense, clone):
    layer = make_sparse(dense)
    twin = clone(layer)
    x = torch.randn(2, 10)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.values.zero_()
    assert layer.values.any()


def test_half_keeps_the_indices(dense):
    layer = make_sparse(dense).to(torch.bfloat16)
    assert layer.values.dtype == layer.reservoir.dtype == torch.bfloat16
    assert layer.columns.dtype == torch.int16
    assert layer(torch.randn(2, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_to_dense_gives_the_stock_layer_back(dense):
    layer = make_sparse(dense)
    back = layer.to_dense(layer.weight.clone())
    assert type(back) is type(dense)
    assert torch.equal(back.weight, layer.weight)
    assert back.bias is layer.bias


@pytest.mark.parametrize("device", ["same", "cpu", "disk"])
class TestReservoirDevice:
    """A layer does the same wherever its reservoir rests."""

    def test_state_dict_round_trip(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device)
        layer.reassign(*choose_sets(torch.rand(7, 10), 0.1, 0.3))
        state = layer.state_dict()
        assert state.keys() == make_sparse(dense).state_dict().keys()
        other = make_sparse(dense, reservoir_device=device)
        other.load_state_dict(state)
        assert torch.equal(other.theta(), layer.theta())
        state.pop("reservoir")
        with pytest.raises(RuntimeError, match='Missing.*"reservoir"'):
            other.load_state_dict(state)

    def test_a_loaded_state_stays_as_it_is(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device)
        state = make_sparse(dense, density=0.1, backward_density=0.3).state_dict()
        before = copy.deepcopy(state)
        layer.load_state_dict(state)
        with torch.no_grad():
            layer.values.add_(1.0)
        layer.reassign(*choose_sets(torch.rand(7, 10), 0.1, 0.3))
        for name, tensor in before.items():
            assert torch.equal(state[name], tensor), name

    def test_reassign_and_shrink(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device)
        theta, place = layer.theta(), layer.reservoir.data_ptr()
        layer.reassign(*choose_sets(torch.rand(7, 10), 0.2, 0.5))
        assert torch.equal(layer.theta(), theta)
        assert layer.reservoir.data_ptr() == place  # pinned memory takes long to get
        active = layer.pattern.active_mask()
        layer.reassign(active, active)
        assert torch.equal(layer.theta(), theta)

    def test_copies_rest_at_the_same_place(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.reservoir.zero_()
            assert layer.reservoir.all()
            assert twin.reservoir_device == device
            assert ("reservoir" in dict(twin.named_buffers())) == (device == "same")

    def test_dtype_follows_the_layer(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device)
        theta = layer.theta()
        assert torch.equal(layer.to(torch.bfloat16).theta(), theta.to(torch.bfloat16))
        assert layer.reservoir.dtype == torch.bfloat16

    def test_only_same_moves_with_the_layer(self, dense, device):
        layer = make_sparse(dense, reservoir_device=device).to("meta")
        assert layer.values.device.type == "meta"
        assert layer.reservoir.device.type == ("meta" if device == "same" else "cpu")

    def test_a_layer_without_reservoir(self, dense, device):
        layer = make_sparse(dense, density=0.5, backward_density=1.0, reservoir_device=device)
        assert layer.reservoir.numel() == 0 and layer.reservoir_use == 0
        assert torch.equal(layer.dense_weight(), dense.weight)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("gradients", [True, False])
def test_operands_that_do_not_fit_are_refused(dense, backend, gradients):
    layer = make_sparse(dense, backend=backend)
    with torch.set_grad_enabled(gradients):
        for shape in ((2, 9), (2, 11), (2, 1), ()):
            with pytest.raises(ValueError, match="does not fit a sparse layer of 10 inputs"):
                layer(torch.randn(shape))
        with pytest.raises(ValueError, match="input is on meta and the layer's values on cpu"):
            layer(torch.randn(2, 10, device="meta"))
        layer.bias = nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match=r"a bias of shape \(1,\)"):
            layer(torch.randn(2, 10))


@pytest.mark.parametrize("gradients", [True, False])
def test_transforms_see_the_product(dense, gradients):
    layer, x = make_sparse(dense), torch.randn(4, 10)
    expected = layer(x).detach()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(x).detach(), expected)
        assert len(torch.fx.experimental.proxy_tensor.make_fx(layer)(x).graph.nodes) > 3
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == expected.shape


def test_a_state_of_other_blocks_is_refused_and_changes_nothing(dense):
    layer = make_sparse(dense)
    theta, state = layer.theta(), layer.state_dict()
    state["row_offsets"] = torch.cat([state["row_offsets"], state["row_offsets"][-1:]])
    with pytest.raises(RuntimeError, match="another block_size"):
        layer.load_state_dict(state)
    assert torch.equal(layer.theta(), theta)


def test_initialising_anew_is_refused(dense):
    with pytest.raises(RuntimeError, match="initialise the dense model"):
        make_sparse(dense).reset_parameters()


def test_weight_passes_the_gradient_of_all_of_b(dense):
    layer, x = make_sparse(dense), torch.randn(4, 10)
    (layer(x) ** 2).sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    (nn.functional.linear(x, layer.to_rows(layer.weight), layer.bias) ** 2).sum().backward()
    torch.testing.assert_close(layer.values.grad, expected)


@pytest.mark.parametrize("shape", [(5, 10), (2, 5, 10)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_may_be_changed_in_place(dense, shape, backend):
    layer, x = make_sparse(dense, backend=backend), torch.randn(shape)
    layer(x).mul_(2).sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    (2 * layer(x)).sum().backward()
    torch.testing.assert_close(layer.values.grad, expected)


def test_a_layer_is_frozen_by_its_weight_as_adapters_do(dense):
    layer = make_sparse(dense)
    layer.weight.requires_grad = False
    assert not layer.values.requires_grad
    layer.weight.requires_grad_(True)
    assert layer.values.requires_grad
    layer.weight.requires_grad_(requires_grad=False)
    assert not layer.values.requires_grad

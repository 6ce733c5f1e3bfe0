"""Training on a device that is not there: none of its tensors meets one of the CPU, and no step waits for it."""

import importlib
from functools import partial

import pytest
import torch
from other_device import NAME, OtherDevice, numbers
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from toy_models import choose_sets

from hf_topkast import TopKastController, sparsify, sparsity_report
from hf_topkast.layers.linear import TopKastLinear
from hf_topkast.ops.grouped import grouped_linear
from hf_topkast.storage import Pattern, spread_blocks


@pytest.fixture
def other_device(monkeypatch):
    """The other device, for a `with` statement."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != NAME and enabled(kind))
    # A parameter of an ordinary tensor cannot become one of the other device in its place.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with torch.autograd.set_multithreading_enabled(False):
        yield OtherDevice()
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture
def kernels(other_device, monkeypatch):
    """Has Triton's interpreter run on the other device, and refuse tensors of the CPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if not importlib.import_module("hf_topkast.ops.triton.launch").INTERPRETED:
        pytest.skip("Triton compiles for a GPU here")
    run = interpreter.InterpretedFunction.run

    def launch(self, *args, **kwargs):
        assert not any(type(one) in (torch.Tensor, nn.Parameter) for one in args)
        kernel = partial(run, self, *map(numbers, args), **kwargs)
        other_device.launches.append(kernel)
        with _disable_current_modes():
            return kernel()

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)


def train(device: str, backend: str, late: bool = False, **settings) -> tuple[list[torch.Tensor], list[bool]]:
    """θ of two sparse layers and the last dX after some steps, and which of the steps made the host wait."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 48))
    densities = {"density": 0.3, "backward_density": 0.5, "refresh_every": 2}
    if late:
        sparsify(model, target_modules=["0", "2"], backend=backend, **densities, **settings).to(device)
    else:
        sparsify(model.to(device), target_modules=["0", "2"], backend=backend, **densities, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = TopKastController(model, optimizer)
    mode, waits = _get_current_dispatch_mode(), []
    for _ in range(5):
        x = torch.randn(7, 96).to(device).requires_grad_()
        before = mode and len(mode.reads)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        waits.append(mode is not None and len(mode.reads) > before)
    assert controller.mask_churn > 0
    assert controller.metrics()["topkast/density"] == sparsity_report(model).density
    model.load_state_dict(model.state_dict())
    return [numbers(one) for one in (model[0].theta(), model[2].theta(), x.grad)], waits


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]):
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reservoir_device": "cpu"},
        {"reservoir_device": "disk"},
        {"block_size": 16},
        {"distribution": "global"},
        {"explore_until": 3},
        {"distribution": "erdos_renyi", "density_overrides": {"2": 0.4}},
        {"penalty": 0.1, "penalty_mode": "decoupled"},
        {"new_state": "mean", "exploration_lr_scale": 0.5},
    ],
    ids=str,
)
def test_training_elsewhere_is_that_on_the_cpu(other_device, settings, late):
    with other_device:
        got, _ = train(NAME, "reference", late, **settings)
    assert_same(got, train("cpu", "reference", late, **settings)[0])


@pytest.mark.parametrize("block_size", [1, [4, 2], 16, [16, 32]], ids=str)
def test_only_the_first_step_and_refreshes_make_the_host_wait(other_device, kernels, block_size):
    with other_device:
        got, waits = train(NAME, "triton", block_size=block_size)
    assert_same(got, train("cpu", "reference", block_size=block_size)[0])
    assert waits == [True, True, False, True, False]  # at the first it looks how hard the penalty pulls


def choose_blocks(seed, block_size):
    scores = torch.rand(64 // block_size, 96 // block_size, generator=torch.Generator().manual_seed(seed))
    return [spread_blocks(mask, (block_size, block_size)) for mask in choose_sets(scores, 0.3, 0.5)]


def make_layer(seed, block_size):
    torch.manual_seed(seed)
    sets = choose_blocks(seed, block_size)
    return TopKastLinear(nn.Linear(96, 64), *sets, "triton", block_size=(block_size, block_size)).to(NAME)


@pytest.mark.parametrize("first", ["columns", "row_offsets"])
def test_a_state_that_comes_from_the_host_in_parts(other_device, first):
    with other_device:
        layer, state = make_layer(0, 16), make_layer(1, 16).to("cpu").state_dict()
        part = {first: state.pop(first)}
        layer.load_state_dict(part, strict=False, assign=True)
        assert layer._current_walk() is None  # that of sets on two devices
        layer.load_state_dict(state, strict=False, assign=True)
        assert torch.equal(layer.pattern.column_walk, layer.pattern.walk_by_columns())


@pytest.mark.parametrize("change", ["refresh", "load"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_what_a_graph_would_replay_follows_the_sets(other_device, kernels, block_size, change):
    with other_device:
        layer, other = make_layer(0, block_size), make_layer(1, block_size)
        x, dy = torch.randn(40, 96).to(NAME).requires_grad_(), torch.randn(40, 64).to(NAME)

        def step():
            y = layer(x)
            return [y.detach(), *torch.autograd.grad(y, (x, layer.values), dy)]

        reads = len(other_device.reads)
        other_device.launches.clear()
        captured, graph = step(), list(other_device.launches)
        assert len(other_device.reads) == reads  # no graph can have those
        before = [numbers(one).clone() for one in captured]
        if change == "refresh":
            layer.reassign(*(mask.to(NAME) for mask in choose_blocks(1, block_size)))
        else:
            layer.load_state_dict(other.state_dict())
        for launch in graph:
            launch()
        for replayed, now, then in zip(captured, step(), before, strict=True):
            torch.testing.assert_close(numbers(replayed), numbers(now))
            assert not torch.equal(numbers(now), then)
        alpha = layer.theta() * layer.active_mask
        torch.testing.assert_close(numbers(captured[1]), numbers(dy @ alpha))


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)], ids=str)
def test_products_of_experts_wait_for_nothing_and_follow_the_rows_of_each(other_device, kernels, block_size):
    experts, out, width = 4, 32, 48
    draw = torch.rand(experts * out // block_size[0], width // block_size[1])
    pattern = Pattern.from_masks(*(spread_blocks(draw < share, block_size) for share in (0.4, 0.7)), block_size)
    given = torch.randn(12, width), torch.randn(pattern.stored), torch.randn(experts, out)
    splits = [torch.tensor(split, dtype=torch.int32) for split in ([3, 3, 8, 10], [0, 12, 12, 12])]
    dy = torch.randn(12, out)

    def step(device, ends, backend):
        x, values, bias = (tensor.to(device).requires_grad_() for tensor in given)
        sets = pattern._replace(row_offsets=pattern.row_offsets.to(device), columns=pattern.columns.to(device))
        y = grouped_linear(x, ends, values, sets._replace(column_walk=None), bias, backend)
        return [y.detach(), *torch.autograd.grad(y, (x, values, bias), dy.to(device))]

    with other_device:
        ends = splits[0].to(NAME)
        other_device.reads.clear()
        other_device.launches.clear()
        captured, graph = step(NAME, ends, "triton"), list(other_device.launches)
        assert other_device.reads == []
        first = [numbers(one).clone() for one in captured]
        ends.copy_(splits[1].to(NAME))
        for launch in graph:
            launch()
        second = [numbers(one).clone() for one in captured]
    for got, split in zip((first, second), splits, strict=True):
        assert_same(got, step("cpu", split, "reference"))


def test_mixed_devices_are_noticed(other_device):
    with other_device:
        model = nn.Linear(4, 3).to(NAME)
        with pytest.raises(RuntimeError, match="on two devices"):
            model(torch.ones(2, 4))
        total = model(torch.ones(2, 4).to(NAME)).sum().detach()
        assert other_device.reads == []
        float(total), total.to("cpu"), torch.empty(()).copy_(total)
    assert len(other_device.reads) == 3


FOUND = {
    "mask": lambda row, places: row[row > 1],
    "mask to write at": lambda row, places: row.index_put_((row > 1,), row[:1]),
    "masked_select": lambda row, places: row.masked_select(row > 1),
    "repeat_interleave": lambda row, places: places.repeat_interleave(places),
    "nonzero": lambda row, places: row.nonzero(),
    "unique": lambda row, places: row.unique(),
    "unique of rows": lambda row, places: row[None].unique(dim=0),
    "unique_consecutive": lambda row, places: row.unique_consecutive(),
    "bincount": lambda row, places: places.bincount(),
    "equal": lambda row, places: torch.equal(row, row),
    "allclose": lambda row, places: torch.allclose(row, row),
    "bool": lambda row, places: bool(row[0]),
    "tolist": lambda row, places: row.tolist(),
}
LAUNCHED = {
    "places": lambda row, places: (row > 1)[places],
    "places to write at": lambda row, places: (row > 1).index_put_((places,), row[1:2] > 0),
    "masked_fill": lambda row, places: row.masked_fill(row > 1, 0),
    "repeat_interleave": lambda row, places: places.repeat_interleave(places, output_size=3),
}


@pytest.mark.parametrize("call", FOUND.values(), ids=FOUND)
def test_what_the_host_waits_for_is_noticed(other_device, call):
    with other_device:
        call(torch.arange(4.0).to(NAME), torch.tensor([1, 2]).to(NAME))
    assert other_device.reads


@pytest.mark.parametrize("call", LAUNCHED.values(), ids=LAUNCHED)
def test_what_it_need_not_wait_for_passes(other_device, call):
    with other_device:
        call(torch.arange(4.0).to(NAME), torch.tensor([1, 2]).to(NAME))
    assert other_device.reads == []

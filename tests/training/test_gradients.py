import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import make_family
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.layers import TopKastLinear
from hf_topkast.ops import BACKENDS
from hf_topkast.sets import SetPlan, selection
from hf_topkast.surgery import sparse_layers
from hf_topkast.training import gradients
from hf_topkast.training.gradients import GradientWatch, PartGradients


def make_layer(shape, block_size=(1, 1), backend="reference", dtype=torch.float32, density=0.5, seed=0):
    """A layer whose sets are whole blocks, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    blocks = torch.rand(shape[0] // block_size[0], shape[1] // block_size[1], generator=generator) < density
    mask = torch.kron(blocks.int(), torch.ones(block_size, dtype=torch.int)).bool()
    return TopKastLinear(dense, mask, mask, backend, "nowhere", block_size)


def see(watch, x, dy):
    """Shows a watch one pass."""
    y = torch.zeros(*dy.shape, dtype=dy.dtype, requires_grad=True)
    output = y * 1
    watch(x, output)
    output.backward(dy)
    watch.layer.values.grad = torch.zeros_like(watch.layer.values)  # as a pass through the layer leaves it


def small_integers(*shape, generator, most=1):
    return torch.randint(-most, most + 1, shape, generator=generator)


def first_largest(scores, count, among):
    """The `count` largest of the marked places; of equal ones the first."""
    order = sorted(among.flatten().nonzero().flatten().tolist(), key=lambda place: (-scores.flatten()[place], place))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(scores.shape)


@st.composite
def cases(draw):
    height, width = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (4, 4)]))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["all", "slice", "some"]))
    part = slice(None)
    if kind == "slice":
        first = draw(st.integers(0, rows - 1))
        part = slice(first, draw(st.integers(first + 1, rows)))
    elif kind == "some":
        part = torch.tensor(sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1))))
    return {
        "shape": (rows * height, columns * width),
        "block_size": (height, width),
        "part": part,
        "marked": draw(st.sampled_from([0.05, 0.2, 0.3, 0.8, 1.0])),
        "share": draw(st.floats(0, 1)),
        "chunk": draw(st.sampled_from([1e-9, 0.2, 0.5, 1.0])),
        "passes": draw(st.integers(1, 3)),
        "backend": draw(st.sampled_from(["auto", *BACKENDS])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "seed": draw(st.integers(0, 2**20)),
    }


@given(cases())
@settings(max_examples=120, deadline=None)
def test_the_largest_are_those_of_the_whole_gradient(case):
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = case["dtype"]
    backend = "reference" if dtype == torch.float64 else case["backend"]
    layer = make_layer(case["shape"], case["block_size"], backend, dtype, seed=case["seed"])
    watch = GradientWatch(layer)
    whole = torch.zeros(case["shape"], dtype=torch.int64)
    for _ in range(case["passes"]):
        x = small_integers(2, 3, case["shape"][1], generator=generator)
        dy = small_integers(2, 3, case["shape"][0], generator=generator)
        whole += torch.einsum("bti,bto->oi", x, dy)
        see(watch, x.to(dtype), dy.to(dtype))
    (height, width), part = case["block_size"], case["part"]
    squares = (whole**2).unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3))[part]
    among = torch.rand(squares.shape, generator=generator) < case["marked"]
    count = round(case["share"] * int(among.sum()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "CHUNK", case["chunk"])
        patch.setattr(gradients, "MIN_CHUNK_ELEMENTS", 1)
        found = PartGradients(layer, watch, part).largest(count, among)
    assert torch.equal(found, first_largest(squares, count, among))


@pytest.mark.parametrize("share", [0.2, 0.9])  # both ways
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_both_ways_see_the_gradient_that_autograd_makes(share, block_size):
    generator = torch.Generator().manual_seed(1)
    layer = make_layer((64, 48), block_size, density=1.0, dtype=torch.float64)
    watch = layer.gradient_watch = GradientWatch(layer)
    for _ in range(2):
        x = torch.randn(3, 5, 48, dtype=torch.float64, generator=generator)
        layer(x).pow(3).sum().backward()
    norms = layer.values.grad.new_zeros(64, 48)
    norms.view(-1)[layer.pattern.flat_index()] = layer.values.grad
    torch.testing.assert_close(watch.rows(slice(None)), norms, rtol=1e-12, atol=1e-12)
    norms = norms.unflatten(1, (-1, block_size[1])).unflatten(0, (-1, block_size[0])).square().sum((1, 3)).sqrt()
    among = torch.rand(norms.shape, generator=generator) < share
    part = PartGradients(layer, watch, slice(None))
    assert torch.equal(part.largest(20, among), first_largest(norms, 20, among))
    torch.testing.assert_close(part.of_active(), norms, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_what_is_kept():
    layer = make_layer((4, 6))
    watch = GradientWatch(layer)
    x, dy = torch.ones(2, 6), torch.ones(2, 4)
    watch(x, torch.zeros(2, 4))  # no gradient comes
    assert watch.passes() == 0
    see(watch, x, dy.masked_fill(torch.eye(2, 4).bool(), torch.inf))
    see(watch, x, dy.masked_fill(torch.eye(2, 4).bool(), torch.nan))
    assert watch.passes() == 0  # a gradient scaler skips that step
    see(watch, x, dy)
    see(watch, x.half(), 2 * dy)
    assert watch.passes() == 2 and watch.rows(slice(1, 3)).tolist() == [[6.0] * 6] * 2
    assert copy.deepcopy(watch).passes() == 0
    watch.forget()
    assert watch.passes() == 0 and not watch.rows(slice(None)).any()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_layer_that_is_passed_twice(reentrant):
    layer = make_layer((6, 6), density=1.0, dtype=torch.float64)
    watch = layer.gradient_watch = GradientWatch(layer)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y = x
        for _ in range(2):
            y = layer(y).tanh() if reentrant is None else checkpoint(layer, y, use_reentrant=reentrant).tanh()
        y.square().sum().backward()
    assert watch.passes() == 4
    expected = layer.values.grad.new_zeros(36)
    expected[layer.pattern.flat_index()] = layer.values.grad
    torch.testing.assert_close(watch.rows(slice(None)), expected.view(6, 6), rtol=1e-12, atol=1e-12)


def test_a_step_that_a_scaler_skips_leaves_nothing_behind():
    model = sparsify(make_gpt2(), method="rigl", refresh_every=1, update_until=100)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    controller = TopKastController(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for spoilt in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, token_batches(1)[0])).backward()
        assert {layer.gradient_watch.passes() for layer in controller.layers.values()} == {1}
        if spoilt:
            model.transformer.wte.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert controller.step == (0 if spoilt else 1)


def test_gradients_of_half_precision_are_summed_in_single():
    layer = make_layer((1, 2), dtype=torch.bfloat16)
    watch = GradientWatch(layer)
    for size in (256.0, 1.0):
        see(watch, torch.ones(1, 2).bfloat16(), torch.full((1, 1), size).bfloat16())
    assert watch.rows(slice(None)).tolist() == [[257.0, 257.0]]
    part = PartGradients(layer, watch, slice(None))
    assert watch.at(part._layer.pattern).dtype == torch.float32


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe"])
@pytest.mark.parametrize("share", [0.2, 0.9])  # both ways
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_experts_by_themselves(family, share, block_size):
    if family == "gpt_oss":  # gate and up in turn
        block_size = 1, block_size[1]
    model = sparsify(make_family(family).double(), density=1.0, block_size=list(block_size), split_fused=True)
    name, layer = next((n, layer) for n, layer in sparse_layers(model) if hasattr(layer, "experts"))
    watch = layer.gradient_watch = GradientWatch(layer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        loss_of(model, torch.randint(2, 48, (2, 9), generator=generator)).backward()
    norms = layer.values.grad.new_zeros(layer.numel)
    norms[layer.pattern.flat_index()] = layer.values.grad
    norms = norms.view(layer.matrix_shape).unflatten(1, (-1, block_size[1])).unflatten(0, (-1, block_size[0]))
    norms = norms.square().sum((1, 3)).sqrt()
    config = model.topkast.config
    of_one = SetPlan(model, {name: layer.matrix_shape}, config).parts[name]
    lines = torch.arange(len(norms)).view(layer.experts, -1)
    for rows in (own[part] for own in lines for part in of_one):
        part = PartGradients(layer, watch, rows)
        among = torch.rand(norms[rows].shape, generator=generator) < share
        assert part.seen()
        assert torch.equal(part.largest(20, among), first_largest(norms[rows], 20, among))
        torch.testing.assert_close(part.of_active(), norms[rows], check_dtype=False, rtol=1e-6, atol=1e-7)


class Living(TorchDispatchMode):
    """The most floating-point numbers at once, of those that were made inside."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // tensor.itemsize
        self.note()
        return result

    def note(self, more=0):
        self.made = {key: each for key, each in self.made.items() if not each[0].expired()}
        self.most = max(self.most, more + sum(count for _, count in self.made.values()))


def living_numbers(run, monkeypatch):
    """The most floating-point numbers that `run` has at once, numpy's copies among them."""
    partition = np.partition
    with Living() as living:

        def counted(array, place):
            living.note(array.size)
            return partition(array, place)

        monkeypatch.setattr(selection.np, "partition", counted)
        run()
    return living.most


def test_the_gradient_of_a_large_layer_is_never_there(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = make_layer((4096, 4096), density=0.2, backend="auto")
    watch = GradientWatch(layer)
    for _ in range(2):
        see(watch, torch.randn(2, 2, 4096, generator=generator), torch.randn(2, 2, 4096, generator=generator))
    size = int(layer.active_count)
    active = layer.pattern.active_mask()
    dropped = active & (torch.rand(active.shape, generator=generator) < 0.3)
    outside = ~(active & ~dropped)
    found = []
    part = PartGradients(layer, watch, slice(None))
    run = lambda: found.append(part.largest(int(dropped.sum()), outside))  # noqa: E731
    assert living_numbers(run, monkeypatch) <= layer.numel / 4
    whole = torch.where(outside, watch.rows(slice(None)).abs(), -1)
    least = whole[found[0]].min()
    assert int(found[0].sum()) == int(dropped.sum()) < size and (whole[~found[0]] <= least).all()


def test_the_count_of_living_numbers_sees_a_whole_gradient(monkeypatch):
    layer = make_layer((64, 64))
    watch = GradientWatch(layer)
    see(watch, torch.ones(2, 64), torch.ones(2, 64))
    assert living_numbers(lambda: watch.rows(slice(None)).abs(), monkeypatch) >= 2 * layer.numel


def test_passes_of_a_step_that_was_given_up_do_not_count():
    model = sparsify(make_gpt2(), method="rigl", density=0.2, refresh_every=1, update_until=100, drop_share=0.5)
    other = copy.deepcopy(model)
    bad, good = token_batches(2)
    sets = []
    for one, batches in ((model, [bad, good]), (other, [good])):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        TopKastController(one, optimizer)
        for tokens in batches:
            optimizer.zero_grad()  # after a loss that was no number, or a scaler's overflow
            one(tokens, labels=tokens).loss.backward()
        optimizer.step()
        sets.append([layer.pattern.columns for _, layer in sparse_layers(one)])
    assert all(torch.equal(first, second) for first, second in zip(*sets))


def test_a_copy_of_a_model_watches_nothing():
    model = sparsify(make_gpt2(), method="rigl", refresh_every=1, update_until=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopKastController(model, optimizer)
    assert all(layer.gradient_watch is not None for _, layer in sparse_layers(model))
    assert all(layer.gradient_watch is None for _, layer in sparse_layers(copy.deepcopy(model)))

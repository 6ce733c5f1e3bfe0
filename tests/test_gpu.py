"""What only a GPU can show: graphs, compiled and distributed training, pinned memory. Skipped where there is none."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.sets.selection import set_size, top_mask
from hf_topkast.storage import spread_blocks
from hf_topkast.surgery import sparse_layers


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
DENSITIES = {"density": 0.3, "backward_density": 0.5}


def make_linear(block_size: int = 1) -> torch.nn.Module:
    """A model of one sparse layer, of at least 4 × 6 blocks."""
    torch.manual_seed(0)
    side = max(16, block_size)
    model = torch.nn.Sequential(torch.nn.Linear(6 * side, 4 * side))
    sparsify(model, **DENSITIES, block_size=block_size, target_modules=["0"], refresh_every=2)
    return model.to(DEVICE)


def make_model(device=DEVICE, **settings) -> torch.nn.Module:
    """A sparse GPT-2 in float64, so that rounding does not decide which weights are the largest."""
    model = sparsify(make_gpt2(dtype=torch.float64), density=0.2, refresh_every=2, **settings).to(device)
    model.loss_type = "ForCausalLM"  # what transformers falls back to; it warns inside the forward otherwise
    return model


def train(model: torch.nn.Module, forward: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Six steps with three refreshes; θ of every sparse layer at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    controller = TopKastController(forward if isinstance(forward, DistributedDataParallel) else model, optimizer)
    for tokens in token_batches(6):
        loss_of(model if forward is None else forward, tokens.to(model.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.mask_churn > 0
    return {name: layer.theta().cpu() for name, layer in sparse_layers(model)}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name)


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_a_graph_replays_with_the_sets_of_a_refresh(block_size):
    model = make_linear(block_size)
    layer = model[0]
    x = torch.randn(40, layer.in_features, device=DEVICE, requires_grad=True)
    dy = torch.randn(40, layer.out_features, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=block_size == 128):  # its kernels are for halves
            y = model(x)
        return y, *torch.autograd.grad(y, (x, layer.values), dy.to(y.dtype))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch asks for; the first call also tunes the kernels
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    before = [tensor.clone() for tensor in step()]
    scores = torch.rand(layer.out_features // block_size, layer.in_features // block_size, device=DEVICE)
    sets = (top_mask(scores, set_size(scores.numel(), share)) for share in DENSITIES.values())
    layer.reassign(*(spread_blocks(mask, (block_size, block_size)) for mask in sets))
    graph.replay()
    for replayed, now, then in zip(captured, step(), before):
        torch.testing.assert_close(replayed, now)
        assert not torch.equal(now, then)


@pytest.mark.parametrize("place", ["same", "cpu", "disk"])
def test_training_is_that_of_the_cpu(place):
    model = make_model(reservoir_device=place)
    if place == "cpu":
        assert all(layer.reservoir.is_pinned() for _, layer in sparse_layers(model))
    assert_same(train(model), train(make_model("cpu")))


def test_sets_chosen_ahead_are_those_of_the_cpu():
    assert_same(train(make_model(refresh_lag=1)), train(make_model("cpu", refresh_lag=1)))


def test_gradient_checkpointing():
    model = make_model()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    assert_same(train(model), train(make_model()))


def test_compiled_by_inductor():
    model = make_model()
    assert_same(train(model, torch.compile(model)), train(make_model()))


@pytest.mark.parametrize("block_size", [16, 128])
def test_autocast(block_size):
    model = make_linear(block_size)
    x = torch.randn(40, model[0].in_features, device=DEVICE, requires_grad=True)
    results = {}
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y = model(x)
        results[enabled] = y, *torch.autograd.grad(y.float().square().sum(), (x, model[0].values))
    assert results[True][0].dtype == torch.bfloat16
    for half, whole in zip(results[True], results[False]):
        assert torch.nn.functional.cosine_similarity(half.float().flatten(), whole.flatten(), dim=0) > 0.999


def test_ddp_under_nccl():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_model()
        assert_same(train(model, DistributedDataParallel(model)), train(make_model()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_a_step_waits_for_nothing_between_refreshes(block_size):
    model = make_linear(block_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    TopKastController(model, optimizer)
    x = torch.randn(40, model[0].in_features, device=DEVICE)
    for mode in ("default", "default", "error"):  # the first step tunes, the second refreshes
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=block_size == 128):
                y = model(x)
            y.float().square().sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()

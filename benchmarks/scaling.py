"""
Bytes per rank and bytes sent, dense beside sparse, on 1 and 2 ranks: measured, and as docs/scaling.md calculates them.

    python -m benchmarks.scaling [--width 256] [--layers 2] [--json FILE]
    python -m benchmarks.scaling --plan    # only what the formulas say of large models

Live bytes are those of parameters, gradients, AdamW's moments, structure and reservoir between two steps. Bytes sent
are those of the tensors that are reduced or gathered, in one step and in one refresh. Refresh seconds depend on the
machine's load and links: run it on an idle one.
"""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_topkast import TopKastController, sparsify
from hf_topkast.storage import is_sharded, local
from hf_topkast.surgery import sparse_layers

from .measure import make_gpt2, make_parser, report


DENSITIES = [(0.2, 0.4), (0.1, 0.2), (0.05, 0.1)]
ENGINES = [("none", 1), ("ddp", 2), ("fsdp2", 2)]


def llama(layers: int, width: int, hidden: int, keys: int, vocabulary: int, tied: bool) -> dict[str, int]:
    """Weights of the projections, of everything else, and of what is in no block."""
    projections = layers * (2 * width * width + 2 * width * keys + 3 * width * hidden)
    outside = (1 if tied else 2) * vocabulary * width + width
    return {"sparse": projections, "dense": outside + 2 * layers * width, "outside": outside}


MODELS = {
    "1B": llama(16, 2048, 8192, 512, 128256, tied=True),
    "8B": llama(32, 4096, 14336, 1024, 128256, tied=False),
    "70B": llama(80, 8192, 28672, 1024, 128256, tied=False),
}


class Traffic(TorchDispatchMode):
    """Counts the bytes of every tensor that a collective reduces, or gives out gathered."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and ("gather" in name or "reduce" in name):
            # Of a scatter what goes in is whole, of a gather what comes out; the larger one, whatever the signature.
            self.bytes += max(_nbytes(args), _nbytes(result))
        return result


def _nbytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return max(map(_nbytes, tree), default=0) if isinstance(tree, list | tuple) else 0


def live_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that this rank's parts of model, gradients and optimizer occupy, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    parts = [local(tensor.detach()) for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}.values())


def calculated(numbers: dict, density: float | None, engine: str, ranks: int) -> dict:
    """
    The formulas of docs/scaling.md.

    Args:
        numbers (`dict`): `sparse`, the weights that may be sparse, `dense`, all other parameters, and `outside`, those
            of the latter that are in no block: FSDP2 gathers them once in a step, and what is in a block twice.
        density (`float`, *optional*): backward density; `None` for the dense model.
        engine (`str`): `"none"`, `"ddp"` or `"fsdp2"`.
        ranks (`int`): processes.
    """
    n, rest = numbers["sparse"], numbers["dense"]
    stored = n if density is None else density * n
    columns = 0 if density is None else 2 * stored
    live = 16 * (stored + rest)
    if density is not None:
        live += columns + n / 8 + 4 * (n - stored)
    gathered = 2 * (4 * (stored + rest) + columns) - 4 * numbers["outside"]
    sent = {"none": 0, "ddp": 4 * (stored + rest), "fsdp2": gathered + 4 * (stored + rest)}
    refresh = 4 * 4 * stored + 3 * 4 * stored + 4 * (n - stored) if density is not None and engine == "fsdp2" else 0
    return {"live": live / (ranks if engine == "fsdp2" else 1), "step": sent[engine], "refresh": refresh}


def measure(rank: int, ranks: int, engine: str, densities, shape: tuple[int, int], port: int, results):
    """One rank's training of two steps and a refresh."""
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    model = make_gpt2(*shape, positions=64, vocabulary=256)
    if densities is not None:
        sparsify(model, density=densities[0], backward_density=densities[1], refresh_every=10**6)
    layers = [layer for _, layer in sparse_layers(model)]
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "fsdp2":
        for layer in layers:
            layer.offer_columns()
        for block in model.transformer.h:
            fully_shard(block)
        wrapped = fully_shard(model)
    else:
        wrapped = model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    controller = TopKastController(wrapped, optimizer) if layers else None
    sent = {"step": 0, "refresh": 0}
    for _ in range(2):  # DDP's first step still sorts its buckets
        optimizer.zero_grad()
        tokens = torch.randint(0, 256, (1, 32))
        if engine == "ddp":
            buckets = []
            if "hooked" not in sent:
                wrapped.register_comm_hook(buckets, _reduce_and_count)
                sent["hooked"] = buckets
            sent["hooked"].clear()
        with Traffic() as traffic:
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
        sent["step"] = sum(sent["hooked"]) if engine == "ddp" else traffic.bytes
        optimizer.step()
    found = {"live": live_bytes(model, optimizer), "step": sent["step"], "refresh": 0, "refresh seconds": 0.0}
    if controller is not None:
        with Traffic() as traffic:
            controller.refresh()
        found["refresh"] = traffic.bytes
        controller.refresh()  # without the counter, and with the memory of the first
        found["refresh seconds"] = controller.refresh_seconds
        assert engine != "fsdp2" or all(is_sharded(layer.columns) for layer in layers)
    sparse, stored = sum(layer.numel for layer in layers), sum(layer.values.numel() for layer in layers)
    blocks = sum(parameter.numel() for parameter in model.transformer.h.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in trained)
    found["numbers"] = {"sparse": sparse, "dense": everything - stored, "outside": everything - blocks}
    if rank == 0:
        results.put(found)
    if ranks > 1:
        dist.destroy_process_group()


def _reduce_and_count(buckets: list, bucket):
    buckets.append(bucket.buffer().nbytes)
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda reduced: reduced.value()[0] / dist.get_world_size())


def on_ranks(engine: str, ranks: int, densities, shape: tuple[int, int]) -> dict:
    """Rank 0's measurement of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(measure, (ranks, engine, densities, shape, port, results), nprocs=ranks, join=False)
    found = results.get()
    while not context.join():
        pass
    return found


def plan() -> list[dict]:
    """Bytes of models of Llama's shapes on 1, 8 and 64 ranks: calculated, not measured."""
    rows = []
    for name, numbers in MODELS.items():
        for ranks in (1, 8, 64):
            for densities in (None, *DENSITIES):
                stated = calculated(numbers, densities and densities[1], "fsdp2" if ranks > 1 else "none", ranks)
                ddp = calculated(numbers, densities and densities[1], "ddp", ranks)
                rows.append(
                    {
                        "model, ranks": f"{name}, {ranks}",
                        "density / backward": "dense" if densities is None else f"{densities[0]} / {densities[1]}",
                        "GiB per rank": stated["live"] / 2**30,
                        "step GiB": stated["step"] / 2**30,
                        "refresh GiB": stated["refresh"] / 2**30,
                        "DDP: GiB per rank": ddp["live"] / 2**30,
                        "DDP: step GiB": ddp["step"] / 2**30 if ranks > 1 else 0.0,
                    }
                )
    return rows


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args()
    if args.plan:
        report(plan(), args, ["GiB per rank"])
        return
    shape = (args.layers, args.width)
    rows = []
    for engine, ranks in ENGINES:
        dense = on_ranks(engine, ranks, None, shape)
        for densities in (None, *DENSITIES):
            found = dense if densities is None else on_ranks(engine, ranks, densities, shape)
            stated = calculated(found["numbers"], densities and densities[1], engine, ranks)
            rows.append(
                {
                    "engine, ranks": f"{engine}, {ranks}",
                    "density / backward": "dense" if densities is None else f"{densities[0]} / {densities[1]}",
                    "live MiB": found["live"] / 2**20,
                    "over dense": found["live"] / dense["live"],
                    "calculated": stated["live"] / 2**20,
                    "step MiB": found["step"] / 2**20,
                    "step calculated": stated["step"] / 2**20,
                    "refresh MiB": found["refresh"] / 2**20,
                    "refresh calculated": stated["refresh"] / 2**20,
                    "refresh seconds": found["refresh seconds"],
                }
            )
    report(rows, args, ["live MiB", "calculated"])


if __name__ == "__main__":
    main()

r"""
How fast forward, dX and dW|B are against the dense products, token-major in and out, as a layer sees them.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.kernels --threads 2 --json kernels.json

Each peer is timed in pairs with the dense product (torch.matmul), turn and turn about, and what is shown is the median
of the pairs' ratios: dense time / peer time, above 1 is faster than dense. `bound` is how near the peer comes to the
larger of two floors: the multiply-adds on the weights that the product needs, at the rate of a large dense product,
and the bytes of its operands and result, each moved once, at the rate of a large copy. Both rates are measured first.
`--against` puts another peer in the place of the dense product.
Masks are random, of exact density, of single weights or of blocks. `auto` is what a layer runs; `masks` is sparsity
simulated with dense tensors, which multiplies weights and gradients by masks; the weights of torch.sparse are
transposed for dX beforehand, at no charge.

On a GPU:

    python -m benchmarks.kernels --device cuda --dtype bfloat16 --shapes 4096x4096 14336x4096 --tokens 16384 \
        --block-size 64 64 --densities 0.2 0.1
"""

import argparse
import json
import statistics

import torch

from hf_topkast.ops import BACKENDS
from hf_topkast.ops.timing import RandomLayer

from .measure import interleaved, machine, make_parser, median_ratio, plot_bars


PASSES = ("forward", "grad_input", "grad_values")


def parse_arguments() -> argparse.Namespace:
    """Shapes, densities and peers of the run."""
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x768", "768x3072"], help="out x in")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1, 0.05], help="of A")
    parser.add_argument("--backward-ratio", type=float, default=1.0, help="size of B over size of A")
    parser.add_argument("--block-size", nargs=2, type=int, default=[1, 1], help="rows and columns of a block")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--peers", nargs="+", help="default: auto, masks and what else runs on the device")
    parser.add_argument("--against", default="dense", help="what the peers are timed in pairs with")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timings; the median is shown")
    parser.add_argument("--calls", type=int, help="calls in a timing; default: 1, on a GPU 10")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.calls = arguments.calls or (10 if on_gpu else 1)
    arguments.peers = arguments.peers or ["auto", *(["reference"] if on_gpu else [*BACKENDS, "torch.sparse"]), "masks"]
    return arguments


class Problem(RandomLayer):
    """A random layer as its peers hold it, and the least that each product has to do."""

    def __init__(
        self,
        shape: tuple[int, int],
        tokens: int,
        density: float,
        backward_ratio: float,
        dtype: torch.dtype,
        block_size: tuple[int, int] = (1, 1),
        device: str = "cpu",
    ):
        super().__init__(shape, tokens, density, min(1.0, density * backward_ratio), dtype, block_size, device)
        self.active, self.backward = self.pattern.active_mask(), self.pattern.backward_mask()
        self.theta = torch.randn(shape, device=device).to(dtype)
        self.theta.view(-1)[self.pattern.flat_index()] = self.values
        self.alpha = self.theta * self.active
        # Multiply-adds of each pass on the weights that it needs, and bytes: two dense operands, values and columns.
        used = dict(zip(PASSES, (self.pattern.active, self.pattern.active, self.pattern.stored)))
        column = self.pattern.columns.element_size() / (block_size[0] * block_size[1])
        dense = (self.x.numel() + self.dy.numel()) * dtype.itemsize
        self.work = {name: tokens * size for name, size in used.items()}
        self.bytes = {name: dense + size * (dtype.itemsize + column) for name, size in used.items()}

    def peer(self, name: str):
        others = {
            "auto": self.chosen_products,
            "dense": self.dense_products,
            "torch.sparse": self._torch_sparse,
            "masks": self._masks,
        }
        return others[name]() if name in others else self.products(BACKENDS[name])

    def _masks(self):
        return {
            "forward": lambda: self.x @ (self.theta * self.active).T,
            "grad_input": lambda: self.dy @ self.alpha,
            "grad_values": lambda: (self.dy.T @ self.x).mul_(self.backward),
        }

    def _torch_sparse(self):
        alpha, transposed = self.alpha.to_sparse_csr(), self.alpha.T.contiguous().to_sparse_csr()
        stored = self.pattern.backward_mask().to(self.alpha.dtype).to_sparse_csr()
        return {
            "forward": lambda: (alpha @ self.x.T).T.contiguous(),
            "grad_input": lambda: (transposed @ self.dy.T).T.contiguous(),
            "grad_values": lambda: torch.sparse.sampled_addmm(stored, self.dy.T, self.x, beta=0.0).values(),
        }


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Multiply-adds per second of a large dense product, bytes per second of a large copy: the best of ten."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(4 * side, side, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = interleaved(runs, 10, device)
    return side**3 / min(seconds["product"]), 2 * source.nbytes / min(seconds["copy"])


def measure(problem: Problem, peer: str, arguments: argparse.Namespace, limits: tuple[float, float]) -> dict:
    """One row of the table: per pass, and for the three together, by the sums of the medians."""
    against, own = problem.peer(arguments.against), problem.peer(peer)
    row, floors = {}, []
    for name in PASSES:
        runs = {"against": against[name], "peer": own[name]}
        seconds = interleaved(runs, arguments.rounds, arguments.device, arguments.calls)
        base, other = seconds["against"], seconds["peer"]
        floors.append(max(problem.work[name] / limits[0], problem.bytes[name] / limits[1]))
        row[name] = cell(statistics.median(base), statistics.median(other), median_ratio(base, other), floors[-1])
    base, other = (sum(row[name][key] for name in PASSES) / 1e3 for key in ("against_ms", "peer_ms"))
    row["together"] = cell(base, other, base / other, sum(floors))
    return row


def cell(against: float, peer: float, ratio: float, least: float) -> dict:
    """Milliseconds of both and of the floor, which no peer can undercut."""
    times = {"against_ms": 1e3 * against, "peer_ms": 1e3 * peer, "floor_ms": 1e3 * least}
    return {**times, "ratio": ratio, "bound": least / peer}


def main():
    """Prints the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    limits = rates(dtype, arguments.device)
    used = machine(arguments.device)
    settings = {name: getattr(arguments, name) for name in ("dtype", "against", "block_size")}
    result = {"machine": used, **settings, "rows": []}
    result.update(peak_gflops=2e-9 * limits[0], copy_gbytes_per_second=1e-9 * limits[1])
    print(" · ".join(f"{key} {value}" for key, value in used.items()))
    print(
        f"{arguments.dtype}, blocks of {arguments.block_size[0]}×{arguments.block_size[1]}; dense product at "
        f"{2e-9 * limits[0]:.0f} GFLOP/s, copy at {1e-9 * limits[1]:.0f} GB/s; "
        f"cells: {arguments.against}/peer (peer ms, floor/peer)"
    )
    print("| out × in | tokens | density | peer | forward | dX | dW at B | together |\n" + "| --- " * 8 + "|")
    for shape in arguments.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for tokens in arguments.tokens:
            for density in arguments.densities:
                size = (out_features, in_features)
                settings = arguments.backward_ratio, dtype, arguments.block_size, arguments.device
                problem = Problem(size, tokens, density, *settings)
                for peer in arguments.peers:
                    row = measure(problem, peer, arguments, limits)
                    result["rows"].append({"shape": size, "tokens": tokens, "density": density, "peer": peer, **row})
                    cells = [f"{c['ratio']:.2f} ({c['peer_ms']:.3g}, {c['bound']:.0%})" for c in row.values()]
                    print("|", " | ".join([shape, str(tokens), f"{density:g}", peer, *cells]), "|", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        names = list(dict.fromkeys(name_of(row) for row in result["rows"]))
        peers = {peer: [row for row in result["rows"] if row["peer"] == peer] for peer in arguments.peers}
        series = {peer: [row["together"]["ratio"] for row in rows] for peer, rows in peers.items()}
        plot_bars(names, series, arguments.plot, used)


def name_of(row: dict) -> str:
    """A row's problem, for the plot."""
    return f"{row['shape'][0]}×{row['shape'][1]}, {row['tokens']} tokens, {row['density']:g}"


if __name__ == "__main__":
    main()

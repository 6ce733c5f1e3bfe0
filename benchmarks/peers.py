"""
How fast whole sparse layers are, forward and backward through autograd: ours beside those of other packages.

    pip install scipy pybind11 && pip install --no-build-isolation --no-deps sparseprop sparselab  # what you want
    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.peers --threads 2 --json peers.json

A peer that is not installed is left out. All layers have random masks of one density, no bias, float32, and B = A;
what is timed is an output and the gradients of input and weights, in turn with a dense `nn.Linear`. Ratios are dense
time / peer time, above 1 is faster than dense.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from hf_topkast.layers.linear import TopKastLinear
from hf_topkast.sets.selection import set_size, top_mask

from .measure import interleaved, make_parser, median_ratio, report


def topkast(dense: nn.Linear, mask: torch.Tensor) -> nn.Module:
    """Ours."""
    return TopKastLinear(dense, mask, mask)


def torch_sparse(dense: nn.Linear, mask: torch.Tensor) -> nn.Module:
    """torch's CSR tensors, whose gradients torch computes."""
    layer = nn.Module()
    layer.weight = nn.Parameter((dense.weight.detach() * mask).to_sparse_csr())
    layer.forward = lambda x: (layer.weight @ x.T).T
    return layer


def sparseprop(dense: nn.Linear, mask: torch.Tensor) -> nn.Module:
    """SparseProp (Nikdan et al. 2023)."""
    from sparseprop.modules.linear import SparseLinear

    return SparseLinear(dense.weight.detach() * mask)


def sparselab(dense: nn.Linear, mask: torch.Tensor) -> nn.Module:
    """sparselab, which draws a mask of its own."""
    from sparselab.nn import SparseLinear

    density = float(mask.float().mean())
    return SparseLinear(dense.in_features, dense.out_features, bias=False, sparsity=1 - density)


PEERS: dict[str, Callable[[nn.Linear, torch.Tensor], nn.Module]] = {
    "hf_topkast": topkast,
    "torch.sparse": torch_sparse,
    "sparseprop": sparseprop,
    "sparselab": sparselab,
}


def make_run(layer: nn.Module, tokens: int, in_features: int, out_features: int) -> Callable[[], object]:
    """A forward and a backward pass of a layer."""
    x = torch.randn(tokens, in_features, requires_grad=True)
    dy = torch.randn(tokens, out_features)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x768", "512x2048"], help="out x in")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1, 0.05])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    installed = [name for name in PEERS if name in ("hf_topkast", "torch.sparse") or find_spec(name)]
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=installed)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for density in args.densities:
            torch.manual_seed(0)
            dense = nn.Linear(in_features, out_features, bias=False)
            mask = top_mask(torch.rand(out_features, in_features), set_size(dense.weight.numel(), density))
            row: dict[str, object] = {"shape": shape, "density": density}
            for name in args.peers:
                layers = {"dense": dense, name: PEERS[name](dense, mask)}
                runs = {key: make_run(layer, args.tokens, in_features, out_features) for key, layer in layers.items()}
                seconds = interleaved(runs, args.rounds)
                row[name] = median_ratio(seconds["dense"], seconds[name])
                row[f"{name} ms"] = 1e3 * statistics.median(seconds[name])
            rows.append(row)
    report(rows, args, args.peers)


if __name__ == "__main__":
    main()

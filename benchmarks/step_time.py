"""
Whole training steps, sparse against dense, in one process: forward, backward and optimizer.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.step_time [--width 768] [--layers 4] [--json FILE]

Rounds are interleaved; a ratio is the median over the rounds of dense over sparse time, so above 1 the sparse step is
faster. The Amdahl bound is the ratio if all sparse products were free: dense step over (dense step − its projections).
The refresh is timed apart, as a share of `refresh_every` sparse steps.
"""

import statistics
import time

import torch
from transformers.pytorch_utils import Conv1D

from hf_topkast import TopKastController, sparsify

from .measure import interleaved, make_gpt2, make_parser, median_ratio, report


SETTINGS = [(0.2, 0.4), (0.1, 0.2), (0.05, 0.1)]


class Step:
    """One model's training step, with the seconds of its three parts."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def __call__(self):
        times = [time.perf_counter()]
        loss = self.model(self.tokens, labels=self.tokens).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        for name, start, end in zip(self.parts, times, times[1:]):
            self.parts[name].append(end - start)


def projection_seconds(model, tokens: int, rounds: int = 5) -> float:
    """Seconds of a dense model's projections alone, forward, dX and dW together, on as many tokens."""
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, Conv1D)]
    problems = {
        (n_in, n_out): (torch.randn(tokens, n_in), torch.randn(n_in, n_out), torch.randn(tokens, n_out))
        for n_in, n_out in shapes
    }

    def products():
        for shape in shapes:
            x, weight, dy = problems[shape]
            x @ weight, dy @ weight.T, x.T @ dy

    return statistics.median(interleaved({"dense": products}, rounds)["dense"])


def pair(text: str) -> tuple[float, float]:
    """`0.2/0.4` as two densities."""
    density, backward_density = map(float, text.split("/"))
    return density, backward_density


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--settings", nargs="+", type=pair, default=SETTINGS, help="density/backward density")
    parser.add_argument("--block-size", nargs=2, type=int, default=[1, 1], help="rows and columns of a block")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def model():
        return make_gpt2(args.layers, args.width, args.context, args.vocabulary)

    tokens = torch.randint(0, args.vocabulary, (args.batch, args.context))
    rows = []
    for density, backward_density in args.settings:
        settings = {"density": density, "backward_density": backward_density, "block_size": args.block_size}
        dense, sparse = Step(model(), tokens), Step(sparsify(model(), **settings), tokens)
        controller = TopKastController(sparse.model, sparse.optimizer)
        seconds = interleaved({"dense": dense, "sparse": sparse}, args.rounds)
        dense_step, sparse_step = (statistics.median(seconds[name]) for name in ("dense", "sparse"))
        controller.refresh()
        refresh = controller.refresh_seconds / (100 * sparse_step)
        rest = dense_step - projection_seconds(dense.model, tokens.numel())
        rows.append(
            {
                "block": "{}×{}".format(*args.block_size),
                "density / backward": f"{density} / {backward_density}",
                "dense s": dense_step,
                "sparse s": sparse_step,
                "step": median_ratio(seconds["dense"], seconds["sparse"]),
                **{part: median_ratio(dense.parts[part], sparse.parts[part]) for part in dense.parts},
                "Amdahl bound": dense_step / max(rest, 1e-9),
                "refresh, share of 100 steps": refresh,
            }
        )
    report(rows, args, ["step", "forward", "backward", "optimizer"])


if __name__ == "__main__":
    main()

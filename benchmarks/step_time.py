"""
Whole training steps, sparse against dense, in one process: forward, backward and optimizer.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.step_time [--width 768] [--layers 4] [--json FILE]
    python -m benchmarks.step_time --device cuda --bf16 --model 1B --batch 16 --block-size 64 64

Rounds are interleaved; a ratio is the median over the rounds of dense over sparse time, so above 1 the sparse step is
faster: against the dense step in the same dtype, and on a CPU also against the faster of the dense steps in fp32 and
bf16 (autocast), which is what a user would leave behind. The Amdahl bound is the ratio if all sparse products were
free: dense step over (dense step − its projections). The refresh is timed apart, as a share of `refresh_every` sparse
steps.
"""

import statistics

import torch
from transformers.pytorch_utils import Conv1D

from hf_topkast import TopKastController, sparsify

from .measure import add_model, clock, interleaved, make_gpt2, make_parser, median_ratio, report


SETTINGS = [(0.2, 0.4), (0.1, 0.2), (0.05, 0.1)]


class Step:
    """One model's training step, with the seconds of its three parts."""

    def __init__(self, model, tokens, bf16: bool = False):
        self.model, self.tokens, self.bf16 = model, tokens, bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def __call__(self):
        device = self.tokens.device.type
        times = [clock(device)]
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.tokens, labels=self.tokens).loss
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        self.optimizer.step()
        times.append(clock(device))
        self.optimizer.zero_grad()
        for name, start, end in zip(self.parts, times, times[1:]):
            self.parts[name].append(end - start)


def projection_seconds(model, tokens: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Seconds of a dense model's projections alone, forward, dX and dW together, on as many tokens."""
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, Conv1D)]
    device = model.device.type
    problems = {
        (n_in, n_out): [
            torch.randn(*size, device=device).to(dtype) for size in ((tokens, n_in), (n_in, n_out), (tokens, n_out))
        ]
        for n_in, n_out in shapes
    }

    def products():
        for shape in shapes:
            x, weight, dy = problems[shape]
            x @ weight, dy @ weight.T, x.T @ dy

    return statistics.median(interleaved({"dense": products}, rounds, device)["dense"])


def pair(text: str) -> tuple[float, float]:
    """`0.2/0.4` as two densities."""
    density, backward_density = map(float, text.split("/"))
    return density, backward_density


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    add_model(parser, layers=4, width=768, vocabulary=256, context=512, batch=4)
    parser.add_argument("--settings", nargs="+", type=pair, default=SETTINGS, help="density/backward density")
    parser.add_argument("--block-size", nargs=2, type=int, default=[1, 1], help="rows and columns of a block")
    parser.add_argument("--scatter-blocks", action="store_true", help="take a block's rows from the whole layer")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def model():
        return make_gpt2(args.layers, args.width, args.context, args.vocabulary, device=args.device)

    tokens = torch.randint(0, args.vocabulary, (args.batch, args.context), device=args.device)
    rows = []
    for density, backward_density in args.settings:
        blocks = {"block_size": args.block_size, "scatter_blocks": args.scatter_blocks}
        settings = {"density": density, "backward_density": backward_density, **blocks}
        dense, sparse = Step(model(), tokens, args.bf16), Step(sparsify(model(), **settings), tokens, args.bf16)
        controller = TopKastController(sparse.model, sparse.optimizer)
        runs = {"dense": dense, "sparse": sparse}
        if args.device == "cpu":  # a GPU is always faster in bf16, and has no room to spare for a third model
            runs["dense in the other dtype"] = Step(model(), tokens, not args.bf16)
        seconds = interleaved(runs, args.rounds, args.device)
        dense_step, sparse_step = (statistics.median(seconds[name]) for name in ("dense", "sparse"))
        fastest = min((name for name in runs if name != "sparse"), key=lambda name: statistics.median(seconds[name]))
        controller.refresh()
        refresh = controller.refresh_seconds / (100 * sparse_step)
        rest = dense_step - projection_seconds(
            dense.model, tokens.numel(), torch.bfloat16 if args.bf16 else torch.float32
        )
        rows.append(
            {
                "block": "{}×{}".format(*args.block_size) + ", scattered" * args.scatter_blocks,
                "density / backward": f"{density} / {backward_density}",
                "dense s": dense_step,
                "sparse s": sparse_step,
                "step": median_ratio(seconds["dense"], seconds["sparse"]),
                "step, fastest dense": median_ratio(seconds[fastest], seconds["sparse"]),
                **{part: median_ratio(dense.parts[part], sparse.parts[part]) for part in dense.parts},
                "Amdahl bound": dense_step / max(rest, 1e-9),
                "refresh, share of 100 steps": refresh,
            }
        )
    report(rows, args, ["step", "step, fastest dense", "forward", "backward", "optimizer"])


if __name__ == "__main__":
    main()

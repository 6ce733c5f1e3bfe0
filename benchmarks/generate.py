"""
Tokens per second of `generate()`, sparse against dense, in one process.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.generate [--width 1024] [--layers 4] [--json FILE]
    python -m benchmarks.generate --pretrained DIRECTORY --batches 1 8 --dtypes float32 bfloat16 \
        --densities 0.7 0.5 0.3 0.2

One token at a time is bound by reading weights, so fewer weights are less time. With exploration ended (backward
density equal to density) the active weights lie closer together in memory. Rounds are interleaved; ratios are medians:
of dense in the same dtype, and of the dense one that is fastest.
"""

import statistics
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_topkast import sparsify

from .measure import interleaved, make_gpt2, make_parser, median_ratio, report


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--pretrained", type=Path, help="a directory to load instead, which has its own sizes")
    parser.add_argument("--densities", nargs="+", default=["0.2/0.4", "0.2", "0.1", "0.05"], help="of A, or of A/B")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = [row for density in args.densities for row in measure(density, args)]
    report(rows, args, ["sparse / dense", "sparse / fastest dense"])


def measure(asked: str, args) -> list[dict]:
    """A row for every batch and dtype of one density; `asked` is that of A, with that of B behind a stroke."""
    density, backward_density = ([*map(float, asked.split("/"))] * 2)[:2]
    models = {("dense", dtype): load(args, dtype) for dtype in args.dtypes}
    for dtype in args.dtypes:
        densities = {"density": density, "backward_density": backward_density}
        models["sparse", dtype] = sparsify(load(args, dtype), **densities)
    rows = []
    for batch in args.batches:
        runs = {kind: generator(model, batch, args) for kind, model in models.items()}
        seconds = interleaved(runs, args.rounds, args.device)
        taken = {kind: statistics.median(times) for kind, times in seconds.items()}
        fastest = min((kind for kind in runs if kind[0] == "dense"), key=taken.get)
        rows += [
            {
                "density / backward": f"{density} / {backward_density}",
                "batch, dtype": f"{batch}, {dtype}",
                "dense tokens/s": batch * args.new_tokens / taken["dense", dtype],
                "sparse tokens/s": batch * args.new_tokens / taken["sparse", dtype],
                "sparse / dense": median_ratio(seconds["dense", dtype], seconds["sparse", dtype]),
                "sparse / fastest dense": median_ratio(seconds[fastest], seconds["sparse", dtype]),
            }
            for dtype in args.dtypes
        ]
    return rows


def load(args, dtype: str) -> nn.Module:
    """The dense model, on the device."""
    if args.pretrained:
        model = AutoModelForCausalLM.from_pretrained(args.pretrained)
    else:
        model = make_gpt2(args.layers, args.width, 256, args.vocabulary)
    return model.to(args.device, getattr(torch, dtype)).eval()


def generator(model: nn.Module, batch: int, args):
    """A function that generates after prompts of 8 tokens each."""
    prompt = torch.randint(1, model.config.vocab_size, (batch, 8), device=args.device)
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    return lambda: model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length
    )


if __name__ == "__main__":
    main()

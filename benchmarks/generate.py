"""
Tokens per second of `generate()` at batch 1, sparse against dense, in one process.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.generate [--width 1024] [--layers 4] [--json FILE]

One token at a time is bound by reading weights, so fewer weights are less time. With exploration ended (backward
density equal to density) the active weights lie closer together in memory. Rounds are interleaved; the ratio is the
median.
"""

import statistics

import torch

from hf_topkast import sparsify

from .measure import interleaved, make_gpt2, make_parser, median_ratio, report


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def model():
        return make_gpt2(args.layers, args.width, 256, args.vocabulary).to(args.device).eval()

    prompt = torch.randint(1, args.vocabulary, (1, 8), device=args.device)

    def generator(model):
        length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length
        )

    rows = []
    for density, backward_density in ((0.2, 0.4), (0.2, 0.2), (0.1, 0.1), (0.05, 0.05)):
        sparse = sparsify(model(), density=density, backward_density=backward_density)
        runs = {"dense": generator(model()), "sparse": generator(sparse)}
        seconds = interleaved(runs, args.rounds, args.device)
        rate = {name: args.new_tokens / statistics.median(seconds[name]) for name in runs}
        rows.append(
            {
                "width": args.width,
                "density / backward": f"{density} / {backward_density}",
                "dense tokens/s": rate["dense"],
                "sparse tokens/s": rate["sparse"],
                "sparse / dense": median_ratio(seconds["dense"], seconds["sparse"]),
            }
        )
    report(rows, args, ["sparse / dense"])


if __name__ == "__main__":
    main()

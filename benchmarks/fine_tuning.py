"""
Fine-tunes a byte-level model to a density in several ways, at equal steps, and evaluates it on held-out text.

    python -m benchmarks.fine_tuning MODEL TRAIN VALID [--learning-rates 2e-3] [--only NAME ...] [--json FILE]

MODEL is a directory of a causal language model whose tokens are the 256 bytes, such as the one that
`recipes/run_clm.py recipes/enwik8/cpu/dense.yaml` writes; TRAIN and VALID are text files that it was not trained on.
Every run sees the same windows in the same order: AdamW (β 0.9 and 0.99), 5% warm-up, cosine, clipping at 1. Bits per
byte are over consecutive windows of VALID, of which all bytes but each window's first are predicted.
"""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from hf_topkast import TopKastController, sparsify, sparsity_report

from .measure import make_parser, report


def variants(density: float) -> dict[str, dict | None]:
    """Fields of [`TopKastConfig`] by the name of the run; `None` is the dense model."""
    sparse = {"density": density, "penalty": 1e-5, "exploration_lr_scale": 0.3, "refresh_every": 50}
    return {
        "dense": None,
        "at once": sparse,
        "cubic": {**sparse, "initial_density": 1.0},
        "cubic, no exploration": {**sparse, "initial_density": 1.0, "backward_density": density},
        "at once, global": {**sparse, "distribution": "global"},
        "static": {**sparse, "method": "static"},
    }


def batches(text: torch.Tensor, steps: int, size: int, window: int, seed: int):
    """Yields `steps` tensors of (size, window) bytes from places chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - window, (size,), generator=generator)
        yield torch.stack([text[start : start + window] for start in starts.tolist()]).long()


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: torch.Tensor, window: int) -> float:
    """Mean over the predicted bytes of the whole windows in `text`."""
    model.eval()
    windows = text[: len(text) // window * window].view(-1, window)
    losses = [float(model(part, labels=part).loss) * len(part) for part in windows.long().split(32)]
    return sum(losses) / len(windows) / math.log(2)


def fine_tune(model: nn.Module, text: torch.Tensor, lr: float, args) -> nn.Module:
    """Trains for `args.steps` steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    if hasattr(model, "topkast"):
        TopKastController(model, optimizer, total_steps=args.steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for tokens in batches(text, args.steps, args.batch_size, args.window, args.seed):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="directory of a byte-level causal language model")
    parser.add_argument("train", type=Path, help="text to fine-tune on")
    parser.add_argument("valid", type=Path, help="held-out text")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of the runs wanted; default: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    train, valid = (
        torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in (args.train, args.valid)
    )
    rows = []
    for name, settings in variants(args.density).items():
        if args.only and name not in args.only:
            continue
        for lr in args.learning_rates:
            model = AutoModelForCausalLM.from_pretrained(args.model)
            before = bits_per_byte(model, valid, args.window)
            if settings is not None:
                sparsify(model, **settings)
            start = bits_per_byte(model, valid, args.window)
            fine_tune(model, train, lr, args)
            end = bits_per_byte(model, valid, args.window)
            rows.append(
                {
                    "run": name,
                    "learning rate": f"{lr:g}",
                    "density at the end": sparsity_report(model).density,
                    "before": f"{before:.3f}",
                    "at the first step": f"{start:.3f}",
                    "at the end": f"{end:.3f}",
                    "at the end / before": end / before,
                }
            )
            print(rows[-1], flush=True)
    report(rows, args, ["at the end / before"])


if __name__ == "__main__":
    main()

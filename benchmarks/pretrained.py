"""
Fine-tunes a pretrained model to a density in several ways, at equal tokens: perplexity before, at the cut and after.

    python -m benchmarks.pretrained MODEL TRAIN VALID --json FILE [--only NAME ...] [--densities 0.5] [--steps 500]

MODEL is a directory of a causal language model with its tokenizer; TRAIN and VALID are text files. Each run appends a
line to FILE; runs that stand there with the same settings are passed over, so it can be stopped and started again.
Every run sees the same windows in the same order: AdamW (β 0.9 and 0.95), 5% warm-up, cosine, clipping at 1.
Perplexity is per token, over consecutive windows of VALID, of which all tokens but each window's first are predicted.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from hf_topkast import TopKastController, sparsify, sparsity_report

from .measure import machine


# What is done to the model: fields of `TopKastConfig`, and under "calibrate" what the first sets know of the data.
DENSE = {"dense": None, "lora": None}
SPARSE = {
    "magnitude, static": {"method": "static"},
    "activation, static": {"method": "static", "calibrate": "norms"},
    "corrected, static": {"method": "static", "calibrate": "correct"},
    "magnitude": {"penalty": 0.0},
    "magnitude, default penalty": {},
    "magnitude, schedule": {"penalty": 0.0, "initial_density": 1.0},
    "activation": {"penalty": 0.0, "calibrate": "norms"},
    "activation, damped": {"penalty": 0.0, "calibrate": "norms", "exploration_lr_scale": 0.3},
    "corrected": {"penalty": 0.0, "calibrate": "correct"},
    "activation, schedule": {"penalty": 0.0, "calibrate": "norms", "initial_density": 1.0},
}


def read_tokens(model: str, path: Path, count: int) -> torch.Tensor:
    """The first `count` tokens of a text, (count,), int64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with path.open(encoding="utf-8") as file:
        tokens = tokenizer(file.read(16 * count), return_tensors="pt")["input_ids"][0]
    return tokens[:count]


def windows_of(tokens: torch.Tensor, steps: int, size: int, window: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields `steps` tensors of (size, window) tokens from places chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - window, (size,), generator=generator)
        yield torch.stack([tokens[start : start + window] for start in starts.tolist()])


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, window: int) -> float:
    """Of a token, over the whole windows in `tokens`."""
    model.eval()
    parts = tokens[: len(tokens) // window * window].view(-1, window)
    losses = [float(model(part, labels=part).loss) * len(part) for part in parts.split(4)]
    return math.exp(sum(losses) / len(parts))


def prepare(model: nn.Module, name: str, density: float, train: torch.Tensor, args) -> nn.Module:
    """Makes the model what the run trains; the calibration is the first windows of training."""
    if name == "dense":
        return model
    if name == "lora":
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    settings = {"density": density, "refresh_every": args.refresh_every, **SPARSE[name]}
    calibrate = settings.pop("calibrate", None)
    batches = train[: args.calibration * args.window].view(-1, args.window).split(4)
    calibration = {} if calibrate is None else {"calibration": batches, "correct": calibrate == "correct"}
    return sparsify(model, **settings, **calibration)


def run(name: str, density: float, lr: float, args) -> dict:
    """One training, from the pretrained model to the last perplexity."""
    torch.manual_seed(args.seed)
    train = read_tokens(args.model, args.train, args.train_tokens)
    valid = read_tokens(args.model, args.valid, args.valid_tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    begin = time.perf_counter()
    model = prepare(model, name, density, train, args)
    seconds = {"prepare": time.perf_counter() - begin}
    at_first = perplexity(model, valid, args.window)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    if name in SPARSE:
        TopKastController(model, optimizer, total_steps=args.steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    model.train()
    begin = time.perf_counter()
    for tokens in windows_of(train, args.steps, args.batch, args.window, args.seed):
        model(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    seconds["train"] = time.perf_counter() - begin
    counts = sparsity_report(model)
    return {
        "at the cut": at_first,
        "after": perplexity(model, valid, args.window) if args.steps else at_first,
        "density": counts.density,
        "state bytes": counts.trainable_state_bytes,
        "dense state bytes": counts.dense_state_bytes,
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="Lines of JSON, one for each run.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=[*DENSE, *SPARSE], default=[*DENSE, *SPARSE])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--steps", type=int, default=500, help="0: the cut alone.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--refresh-every", type=int, default=50)
    parser.add_argument("--calibration", type=int, default=16, help="Windows that the first sets are chosen by.")
    parser.add_argument("--train-tokens", type=int, default=2_400_000)
    parser.add_argument("--valid-tokens", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    common = ("steps", "batch", "window", "refresh_every", "calibration", "train_tokens", "valid_tokens", "seed")
    common = {key: getattr(args, key) for key in common}
    rates = args.learning_rates if args.steps else [0.0]
    runs = [(name, 1.0, lr) for name in args.only if name in DENSE for lr in rates]
    runs += [(name, share, lr) for share in args.densities for name in args.only if name in SPARSE for lr in rates]
    for name, density, lr in runs:
        settings = {"run": name, "asked": density, "lr": lr, **common}
        if any(settings.items() <= line.items() for line in lines):
            continue
        line = {**settings, **run(name, density, lr, args), "machine": machine("cpu")}
        lines.append(line)
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        found = f"{line['at the cut']:.2f} at the cut, {line['after']:.2f} after"
        print(f"{name}, density {density}, lr {lr}: {found}", flush=True)


if __name__ == "__main__":
    main()

"""
Fine-tunes a pretrained model to a density in several ways, at equal tokens: perplexity before, at the cut and after.

    python -m benchmarks.pretrained MODEL TRAIN VALID --json FILE --runs "dense" "activation, static" [--densities 0.5]

MODEL is a directory of a causal language model with its tokenizer; TRAIN and VALID are text files. A run is `dense`,
`lora` (r = 16, all projections), or how the first sets are chosen (`magnitude`; `activation`, by a calibration;
`corrected`, which also changes what stays) with any of the options in `OPTIONS`: "corrected, static, distilled".

Each run appends a line to FILE; runs that stand there with the same settings are passed over, so it can be stopped and
started again. Every run sees the same windows in the same order: AdamW (β 0.9 and 0.95), 5% warm-up, cosine, clipping
at 1, no weight decay and no penalty. Perplexity is per token, over consecutive windows of VALID, of which all tokens
but each window's first are predicted. Memory is the peak while a run trains; on a CPU each has a process of its own.
"""

import argparse
import functools
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_topkast import TopKastDistillationTrainer, TopKastTrainer, sparsify, sparsity_report

from .measure import machine


STARTS = {
    "magnitude": {},
    "activation": {"calibration": True},
    "corrected": {"calibration": True, "correct": True},
}
OPTIONS = {
    "static": {"method": "static", "backward_density": None},
    "schedule": {"initial_density": 1.0},
    "damped": {"exploration_lr_scale": 0.3},
    "until half": {"explore_until": 0.5},
    "by layer": {"compare": "layer"},
    "default penalty": {"penalty": 1e-4},
    "distilled": {},
}
# What tells one line of the file from another, beside the run, its density and its learning rate.
SETTINGS = (
    *("steps", "batch", "window", "refresh_every", "exploration", "calibration"),
    *("train_tokens", "valid_tokens", "bf16", "seed", "teacher"),
)


@functools.cache
def read_tokens(model: str, path: Path, count: int) -> torch.Tensor:
    """The first `count` tokens of a text, (count,), int64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with path.open(encoding="utf-8") as file:
        tokens = tokenizer(file.read(16 * count), return_tensors="pt")["input_ids"][0]
    return tokens[:count]


def windows_of(tokens: torch.Tensor, count: int, window: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """As many windows from places chosen by the seed, as Trainer wants them."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - window, (count,), generator=generator)
    places = [tokens[start : start + window] for start in starts.tolist()]
    return [{"input_ids": place, "labels": place} for place in places]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, args: argparse.Namespace) -> float:
    """Of a token, over the whole windows in `tokens`."""
    model.eval()
    parts = tokens[: len(tokens) // args.window * args.window].view(-1, args.window)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        losses = [float(model(part, labels=part).loss) * len(part) for part in parts.to(args.device).split(4)]
    return math.exp(sum(losses) / len(parts))


def prepare(model: nn.Module, name: str, density: float, train: torch.Tensor, args: argparse.Namespace) -> nn.Module:
    """Makes the model what the run trains; the calibration is the first windows of training."""
    start, *options = name.split(", ")
    if start == "dense":
        return model
    if start == "lora":
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    settings = {
        "density": density,
        "backward_density": min(1.0, density + args.exploration),
        "refresh_every": args.refresh_every,
        "penalty": 0.0,
        **STARTS[start],
    }
    for option in options:
        settings |= OPTIONS[option]
    if settings.get("method") == "static":
        settings["refresh_every"] = None
    if settings.pop("calibration", False):
        windows = train[: args.calibration * args.window].view(-1, args.window)
        settings["calibration"] = windows.to(args.device).split(4)
    return sparsify(model, **settings)


def make_trainer(model: nn.Module, teacher: str | None, name: str, lr: float, data: list, args, folder: str):
    """The trainer of a run, with the same arguments for all."""
    arguments = TrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=lr,
        adam_beta2=0.95,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        max_grad_norm=1.0,
        bf16=args.bf16,
        use_cpu=args.device == "cpu",
        seed=args.seed,
        logging_steps=max(1, args.steps // 8),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if teacher is not None:
        return TopKastDistillationTrainer(model=model, teacher=teacher, args=arguments, train_dataset=data)
    kind = Trainer if name in ("dense", "lora") else TopKastTrainer
    return kind(model=model, args=arguments, train_dataset=data)


def peak_bytes(device: str, reset: bool = False) -> int | None:
    """The most memory since the last reset: of torch on a GPU, or of this process, where Linux says so."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def run(name: str, density: float, lr: float, at_the_cut: float | None, args: argparse.Namespace) -> dict:
    """One training, from the pretrained model to the last perplexity."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train = read_tokens(args.model, args.train, args.train_tokens)
    valid = read_tokens(args.model, args.valid, args.valid_tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    teacher = (args.teacher or args.model) if "distilled" in name.split(", ") else None
    begin = time.perf_counter()
    model = prepare(model, name, density, train, args)
    seconds = {"prepare": time.perf_counter() - begin}
    if at_the_cut is None:
        at_the_cut = perplexity(model, valid, args)
    line = {"at the cut": at_the_cut, "after": at_the_cut}
    if args.steps:
        data = windows_of(train, args.steps * args.batch, args.window, args.seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(model, teacher, name, lr, data, args, folder)
            peak_bytes(args.device, reset=True)
            trainer.train()
        line["peak bytes"] = peak_bytes(args.device)
        seconds["train"] = trainer.state.log_history[-1]["train_runtime"]
        history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        line |= {"training loss": history, "after": perplexity(model, valid, args)}
    counts = sparsity_report(model)
    state = {"state bytes": counts.trainable_state_bytes, "dense state bytes": counts.dense_state_bytes}
    return {**line, "density": counts.density, **state, "seconds": seconds, "machine": machine(args.device)}


def run_apart(*arguments) -> dict:
    """[`run`], in a process of its own where memory is that of the process."""
    if arguments[-1].device == "cuda":
        return run(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a run that is none ends it with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, required=True, help="Lines of JSON, one for each run.")
    parser.add_argument("--runs", nargs="+", required=True, help="'dense', 'lora', or a start with its options.")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--steps", type=int, default=500, help="0: the cut alone.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--refresh-every", type=int, default=50)
    parser.add_argument("--exploration", type=float, default=0.1, help="Density of B beyond that of A.")
    parser.add_argument("--calibration", type=int, default=16, help="Windows that the first sets are chosen by.")
    parser.add_argument("--teacher", help="Directory of that of distilled runs. Default: MODEL, untrained.")
    parser.add_argument("--train-tokens", type=int, default=2_400_000)
    parser.add_argument("--valid-tokens", type=int, default=16_384)
    parser.add_argument("--bf16", action="store_true", help="Autocast; weights and optimizer stay in float32.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in args.runs:
        start, *options = name.split(", ")
        whole = name in ("dense", "lora") or start in STARTS
        if not whole or not set(options) <= set(OPTIONS):
            parser.error(f"no run {name!r}: dense, lora, or one of {list(STARTS)} with options of {list(OPTIONS)}")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    lines = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    common = {key: getattr(args, key) for key in SETTINGS}
    rates = args.learning_rates if args.steps else [0.0]
    for share in args.densities:
        for name in args.runs:
            density = 1.0 if name in ("dense", "lora") else share
            for lr in rates:
                settings = {"run": name, "asked": density, "lr": lr, **common}
                if any(settings.items() <= line.items() for line in lines):
                    continue
                same = settings.items() - {("lr", lr)}  # is cut alike
                cut = next((line["at the cut"] for line in lines if same <= line.items()), None)
                line = {**settings, **run_apart(name, density, lr, cut, args)}
                lines.append(line)
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                found = f"{line['at the cut']:.2f} at the cut, {line['after']:.2f} after"
                print(f"{name}, density {density}, lr {lr}: {found}", flush=True)


if __name__ == "__main__":
    main()

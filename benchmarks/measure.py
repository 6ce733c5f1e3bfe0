"""What the benchmarks share: interleaved timing, the models, the machine, and the output."""

import argparse
import datetime
import json
import platform
from importlib import metadata
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel

import hf_topkast
from hf_topkast.ops import BACKENDS, has_triton
from hf_topkast.ops.timing import clock, interleaved, median_ratio  # noqa: F401 (for the benchmarks)


# GPT-2's shapes, by name: layers, width, vocabulary and context.
MODELS = {
    "gpt2-small": {"layers": 12, "width": 768, "vocabulary": 50257, "context": 1024},
    "350M": {"layers": 24, "width": 1024, "vocabulary": 50257, "context": 1024},
    "1B": {"layers": 18, "width": 2048, "vocabulary": 50257, "context": 1024},
}


def make_gpt2(
    layers: int, width: int, positions: int, vocabulary: int, seed: int = 0, device: str = "cpu"
) -> GPT2LMHeadModel:
    """A GPT-2-style model with heads of 64 and a fused GELU, freshly initialised; the same for the same seed."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=max(1, width // 64),
        n_positions=positions,
        vocab_size=vocabulary,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):  # where the numbers are drawn, too
        return GPT2LMHeadModel(config)


def machine(device: str = "cpu") -> dict[str, str]:
    """Processor or GPU, threads, versions and date of a measurement."""
    if device == "cuda":
        kernels = f"Triton {metadata.version('triton')}" if has_triton() else "reference"
    else:
        kernels = BACKENDS["cpu"].isa if "cpu" in BACKENDS else "reference"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "kernels": kernels,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_topkast": hf_topkast.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name, with the vector instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def make_parser(description: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> argparse.ArgumentParser:
    """A command line with `--device`, `--json`, `--plot` and `--threads`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=devices)
    parser.add_argument("--json", type=Path, help="write the measurement to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    return parser


def add_model(parser: argparse.ArgumentParser, **defaults: int):
    """Adds `--layers`, `--width`, `--vocabulary`, `--context`, `--batch`, `--model`, which sets four, and `--bf16`."""

    class Preset(argparse.Action):
        def __call__(self, parser, namespace, name, option_string=None):
            vars(namespace).update(MODELS[name])

    parser.add_argument("--model", action=Preset, choices=MODELS, help="shapes of a GPT-2; later options change them")
    for name in ("layers", "width", "vocabulary", "context", "batch"):
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; the weights stay float32")


def report(rows: list[dict], arguments: argparse.Namespace, bars: list[str]):
    """
    Prints rows of equal keys as a Markdown table below the machine; writes both as JSON, and a plot, if asked.

    Args:
        rows (`list[dict]`): a measurement each; the first two values are its name in the plot.
        arguments (`argparse.Namespace`): of a parser made by [`make_parser`].
        bars (`list[str]`): the keys to draw, ratios of dense to sparse.
    """
    used = machine(arguments.device)
    print(", ".join(f"{key} {value}" for key, value in used.items()))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": used, "rows": rows}, indent=2) + "\n")
    if arguments.plot:
        names = [", ".join(str(value) for value in list(row.values())[:2]) for row in rows]
        plot_bars(names, {bar: [row[bar] for row in rows] for bar in bars}, arguments.plot, used)


def plot_bars(names: list[str], series: dict[str, list[float]], path: Path, used: dict[str, str]):
    """Draws groups of bars, one group a name and one colour a series, with a line at 1: as dense."""
    figure = Figure(figsize=(max(6, 0.9 * len(names)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        axes.bar([group + place * width for group in range(len(names))], values, width, label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(names))], names, rotation=30, ha="right")
    axes.set(title=f"{used['device']}, {used['date']}")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

"""
How long `hf-topkast inspect` takes on large checkpoints, and how much memory.

    python -m benchmarks.inspect_files [--gigabytes 2 100] [--json FILE]

The checkpoints are made up: headers as of a model with blocks of width 4096, and zeros that take no room on a disk
that knows sparse files. Each is inspected by a process of its own, as by the command. Shown are the seconds of that
process, by the clock and by the processor, and its peak memory; and the same of one that imports the command line and
stops. Files of 0.1.0 have no counts in their header: the bits of their sets are read and counted.
"""

import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_topkast import TopKastConfig
from hf_topkast.headers import STATE_NAME, WEIGHTS_NAME

from .measure import make_parser, report


WIDTH = 4096
SHAPES = {"attn.q_proj": (WIDTH, WIDTH), "attn.o_proj": (WIDTH, WIDTH), "mlp.up_proj": (4 * WIDTH, WIDTH)}
BITS = {"U8": 1, "F32": 4, "I64": 8}


def write_zeros(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]):
    """A safetensors file with these types and shapes, all zero and never written."""
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = BITS[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def make_checkpoint(folder: Path, gigabytes: float, counted: bool) -> int:
    """Writes files of about this many gigabytes in all; returns the number of layers."""
    weights, state, shapes, counts = {}, {}, {}, {}
    total, block = 0, 0
    while total < gigabytes * 1e9:
        for kind, (rows, columns) in SHAPES.items():
            name, n = f"model.layers.{block}.{kind}", rows * columns
            active, stored = n // 5, 2 * n // 5
            shapes[name], counts[name] = (rows, columns), (active, stored)
            weights[f"{name}.weight"] = ("F32", (rows, columns))
            state |= {f"{name}.{bits}": ("U8", (n // 8,)) for bits in ("active", "backward", "unvisited")}
            state[f"{name}.rest"] = ("F32", (n - active,))
            state[f"{name}.initial_reservoir_size"] = ("I64", ())
            total += 4 * n + 3 * n // 8 + 4 * (n - active)
        block += 1
    config = json.dumps(TopKastConfig(density=0.2).to_dict())
    metadata = {"format_version": "2", "kind": "training", "step": "1000", "config": config}
    metadata |= {"shapes": json.dumps(shapes), "digests": "{}"}
    if counted:
        metadata["counts"] = json.dumps(counts)
    write_zeros(folder / WEIGHTS_NAME, weights, {"format": "pt"})
    write_zeros(folder / STATE_NAME, state, metadata)
    return len(shapes)


def measure(code: str) -> tuple[float, float, float]:
    """Seconds by the clock and by the processor, and peak MiB, of a Python process that runs some code."""
    told = (
        "; import time; print(time.process_time(), *(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    processor, _, kibibytes, _ = done.stdout.strip().splitlines()[-1].split()
    return seconds, float(processor), int(kibibytes) / 1024


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[2, 100], help="sizes of checkpoints")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind; the medians are shown")
    arguments = parser.parse_args()
    rows = []
    for gigabytes in arguments.gigabytes:
        for counted in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                layers = make_checkpoint(Path(folder), gigabytes, counted)
                codes = {
                    "imports": "import sys; sys.argv = ['hf-topkast']; import hf_topkast.cli",
                    "inspect": "import sys; sys.argv = ['hf-topkast']; from hf_topkast.cli import main; "
                    f"main(['inspect', {folder!r}])",
                }
                found = {name: [measure(code) for _ in range(arguments.rounds)] for name, code in codes.items()}
                size = sum(file.stat().st_size for file in Path(folder).iterdir())
            medians = {name: [statistics.median(each) for each in zip(*runs)] for name, runs in found.items()}
            rows.append(
                {
                    "GB": round(size / 1e9, 1),
                    "counts": "noted" if counted else "by bits",
                    "layers": layers,
                    **dict(zip(("seconds", "processor", "peak MiB"), medians["inspect"])),
                    **dict(zip(("importing", "its processor", "its peak MiB"), medians["imports"])),
                }
            )
    report(rows, arguments, bars=["seconds"])


if __name__ == "__main__":
    main()

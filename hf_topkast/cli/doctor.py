"""`hf-topkast doctor`: what this machine can do, why not more, and how fast sparse products are on it."""

import functools
import platform
import time
from importlib import metadata
from typing import Annotated, Any

import typer

from .output import AsJson, print_json, print_lines, print_table, waiting


# (out, in) of layers as they stand in models of 60 million to a billion parameters, and the tokens of a small batch.
SHAPES = ((512, 512), (768, 3072), (2048, 2048))
TOKENS = 1024
DENSITIES = (0.2, 0.4)
# Of the measurement, for all shapes together.
SECONDS = 10.0
FEWEST_ROUNDS = 3

PACKAGES = ("hf-topkast", "torch", "transformers", "accelerate", "safetensors", "numpy", "triton")
OLDEST = {"torch": (2, 11), "transformers": (5, 17)}


def doctor(
    seconds: Annotated[float, typer.Option(min=0, help="Time for the measurement; 0 for none.")] = SECONDS,
    as_json: AsJson = False,
):
    """
    Tell which products run on this machine, why others do not, and measure sparse against dense.

    Examples:

        hf-topkast doctor

        hf-topkast doctor --seconds 0 --json
    """
    with waiting("Importing torch"):
        found = examine()
    if not as_json:
        _print_findings(found)
    if seconds:
        with waiting(f"Measuring for {seconds:g} seconds"):
            found["measured"] = measure(seconds)
    if as_json:
        print_json(found)
    elif seconds:
        _print_measured(found)


def examine() -> dict[str, Any]:
    """Versions, processors, backends by name with the reason where one does not run, the table and warnings."""
    import torch

    from ..ops.costs import table_in_use
    from ..ops.measured import processor

    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    found = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, threads: {threads}",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "backends": backends(),
        "table": table_in_use(),
    }
    return {**found, "warnings": warnings(found)}


def backends() -> dict[str, dict[str, Any]]:
    """What computes products here: for each backend whether it runs, and what it is or why it does not run."""
    import torch

    from ..ops import BACKENDS, WHY_NO_CPU, has_triton

    built = "cpu" in BACKENDS
    why_not = f"the C++ extension is missing: {WHY_NO_CPU}"
    if not torch.cuda.is_available():
        triton = "torch sees no GPU"
    elif not has_triton():
        triton = "Triton is not installed: pip install 'hf-topkast[gpu]'"
    else:
        triton = "Triton kernels on the GPU"
    return {
        "cpu": {"runs": built, "why": f"C++ kernels for {BACKENDS['cpu'].isa}" if built else why_not},
        "expanded": {"runs": built, "why": "dense products through one layer's weights" if built else why_not},
        "triton": {"runs": has_triton() and torch.cuda.is_available(), "why": triton},
        "reference": {"runs": True, "why": "plain torch, for whatever the others do not take"},
    }


def warnings(found: dict[str, Any]) -> list[str]:
    """What would make trainings slower or other than the tests know them, each with its way out."""
    import torch

    notes = []
    for name, oldest in OLDEST.items():
        version = found["versions"][name]
        if version and tuple(map(int, version.split(".")[:2])) < oldest:
            needed = ".".join(map(str, oldest))
            notes.append(f"{name} {version} is older than {needed}, the oldest that is tested: upgrade it.")
    if not found["backends"]["cpu"]["runs"]:
        notes.append(
            "Without the C++ extension sparse layers save memory but no time on a CPU: install a C++17 compiler with "
            "OpenMP (g++ 12, clang 15) and reinstall with --no-cache-dir --no-binary hf-topkast."
        )
    if found["gpu"] and not found["backends"]["triton"]["runs"]:
        notes.append("The GPU runs the reference products only: pip install 'hf-topkast[gpu]'.")
    from ..ops import costs

    if costs.TABLE.notice and "measured on this machine" not in costs.TABLE.notice:
        notes.append(costs.TABLE.notice)
    if torch.get_num_threads() == 1:
        notes.append("torch uses one thread: unset OMP_NUM_THREADS, or call torch.set_num_threads.")
    return notes


def measure(seconds: float) -> list[dict[str, Any]]:
    """Forward, dX and dW of layers of SHAPES together, sparse against dense, on the GPU if there is one."""
    import torch

    from ..ops.timing import RandomLayer, interleaved, median_ratio

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for shape in SHAPES:
        layer = RandomLayer(shape, TOKENS, *DENSITIES, device=device)
        dense = layer.dense_products()
        sparse = layer.chosen_products()
        runs = {"dense": functools.partial(_all, dense), "sparse": functools.partial(_all, sparse)}
        start = time.perf_counter()
        interleaved(runs, 1, device)
        pair = (time.perf_counter() - start) / 2
        rounds = max(FEWEST_ROUNDS, int((seconds / len(SHAPES) - 3 * pair) / pair))
        times = interleaved(runs, rounds, device)
        rows.append(
            {
                "shape": list(shape),
                "backends": {name: backend.__name__.rpartition(".")[2] for name, backend in layer.chosen().items()},
                "dense_milliseconds": 1000 * sorted(times["dense"])[rounds // 2],
                "sparse_milliseconds": 1000 * sorted(times["sparse"])[rounds // 2],
                "dense_over_sparse": median_ratio(times["dense"], times["sparse"]),
            }
        )
    return rows


def _all(products: dict):
    for product in products.values():
        product()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print_findings(found: dict[str, Any]):
    print_lines(", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items()))
    print_lines(f"processor: {found['processor']}", f"GPU: {found['gpu'] or 'none'}")
    rows = ((name, "yes" if each["runs"] else "no", each["why"]) for name, each in found["backends"].items())
    print_table(["backend", "runs", "what it is, or why not"], rows)
    print_lines(f"sparse or dense products: by {found['table']}")
    print_lines(*(f"warning: {warning}" for warning in found["warnings"]))


def _print_measured(found: dict[str, Any]):
    print_lines(
        "",
        f"Forward, dX and dW together, float32, {TOKENS} tokens, density {DENSITIES[0]}, backward {DENSITIES[1]}:",
    )
    rows = (
        (
            "×".join(map(str, row["shape"])),
            f"{row['dense_milliseconds']:.2f}",
            f"{row['sparse_milliseconds']:.2f}",
            f"{row['dense_over_sparse']:.2f}×",
            ", ".join(row["backends"].values()),
        )
        for row in found["measured"]
    )
    print_table(["out × in", ">dense ms", ">sparse ms", ">dense / sparse", "forward, dX, dW by"], rows)
    print_lines("Above 1× the sparse layer is faster. On a busy machine repeat it.")

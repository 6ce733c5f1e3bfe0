"""
Runs the products as on a GPU that need not be there: Triton chooses, compiles and loads their kernels, and launches
none. Prints what it loaded, as JSON. Not interpreted.

    python tests/ops/compile_kernels.py 90
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_topkast.ops import triton as products
from hf_topkast.storage import Pattern, spread_blocks


# Bytes of shared memory that a block of threads can have, by compute capability.
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TOKENS, OUT, IN, EXPERTS = 100, 512, 512, 4


class CompilingDriver:
    """What Triton asks of a GPU before it launches; a launch does nothing."""

    def __init__(self, capability: int):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED[capability]},
            load_binary=lambda name, kernel, shared, device: (object(), object(), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self):
        def launch_once(call, quantiles, **times):  # or not at all, where Triton finds that the tile does not fit
            call()
            return [1.0] * len(quantiles)

        return launch_once

    def launcher_cls(self, src, metadata):
        return lambda *arguments: None


def pattern_of(block_size: tuple[int, int], seed: int) -> Pattern:
    """Random sets; their sizes differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(OUT // block_size[0], IN // block_size[1], generator=generator)
    return Pattern.from_masks(*(spread_blocks(scores < share, block_size) for share in (0.2, 0.4)), block_size)


def run_products(
    pattern: Pattern, dtype: torch.dtype, loaded: list[str], ends: torch.Tensor | None = None
) -> dict[str, list[str]]:
    """PTX of the kernels that each product loads; `loaded` is where they appear. With `ends`, of experts."""
    out = OUT // (1 if ends is None else EXPERTS)
    x, dy = torch.zeros(TOKENS, IN, dtype=dtype), torch.zeros(TOKENS, out, dtype=dtype)
    values, bias = torch.zeros(pattern.stored), torch.zeros(OUT)
    calls = {
        "forward": lambda: products.forward(x, values, pattern, bias, ends),
        "grad_input": lambda: products.grad_input(dy, values, pattern, ends),
        "grad_values": lambda: products.grad_values(dy, x, pattern, ends),
    }
    found = {}
    for name, call in calls.items():
        call()
        found[name] = loaded[:]
        loaded.clear()
    return found


def main(capability: int):
    loaded = []

    def note(module, function, name, files, key):
        loaded.extend(Path(path).read_text() for path in files.values() if path.endswith(".ptx"))

    driver.set_active(CompilingDriver(capability))
    knobs.runtime.kernel_load_end_hook = note
    products.launch.INTERPRETED = True  # so tensors of the CPU pass for a GPU's
    torch.set_float32_matmul_precision("high")
    found = {}
    everyone = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (TOKENS // EXPERTS)
    one = everyone.clone().fill_(TOKENS)
    for kind, dtype in {"bf16": torch.bfloat16, "tf32": torch.float32}.items():
        for form, block_size in {"blocks": (16, 32), "large blocks": (128, 128), "single": (1, 1)}.items():
            sets, others = (pattern_of(block_size, seed) for seed in (0, 1))
            found[f"{kind} {form}"] = run_products(sets, dtype, loaded)
            found[f"{kind} {form} refreshed"] = run_products(others, dtype, loaded)
            found[f"{kind} experts of {form}"] = run_products(sets, dtype, loaded, everyone)
            found[f"{kind} experts of {form} refreshed"] = run_products(others, dtype, loaded, one)
    found["fp64 experts of single"] = run_products(pattern_of((1, 1), 0), torch.float64, loaded, everyone)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""
Compiles the Triton kernels for GPUs that need not be there, and prints their assembly as JSON. Not interpreted.

    python tests/ops/compile_kernels.py 90
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_topkast.ops.triton import block_sparse, expand


LISTS = ("begins", "features", "stored_at")
INDICES = {"row_offsets": "*i32", "columns": "*i16", **dict.fromkeys(LISTS, "*i32")}


def assembly(kernel, capability: int, number: str, constants: dict, **options) -> str:
    """PTX of a kernel for pointers to numbers of one dtype, aligned as torch's are, and lists that begin anywhere."""
    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name in ("x", "dy", "y", "values", "bias", "gradient", "alpha", "dense")
        signature[name] = f"*{number}" if pointer else INDICES.get(name, "i32")
        if name not in LISTS and (signature[name].startswith("*") or name.endswith("_features")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def compile_all(capability: int, number: str, precision: str) -> dict[str, str]:
    """PTX of every kernel, by name; blocks are 32 × 64."""
    options = {"num_warps": 4}
    tiles = {"TILE_TOKENS": 64, "TILE_K": 64, "TILE_N": 32, "STAGES": 3, "PRECISION": precision}
    forward = {"TRANSPOSED": False, "stored_at": None, "SIDE_N": 32, "SIDE_K": 64, "ALIGNED": 16, **tiles}
    backward = {**forward, "TRANSPOSED": True, "bias": None}
    del backward["stored_at"]
    single = {"HEIGHT": 1, "WIDTH": 1, "TILE": 1024}
    kernels = {
        "forward": (block_sparse._product_kernel, forward, options),
        "grad_input": (block_sparse._product_kernel, backward, options),
        "grad_values": (block_sparse._gradient_kernel, {"HEIGHT": 32, "WIDTH": 64, **tiles}, options),
        "expand": (expand._expand_kernel, single, {}),
        "gather": (expand._gather_kernel, single, {}),
    }
    return {
        name: assembly(kernel, capability, number, constants, **options)
        for name, (kernel, constants, options) in kernels.items()
    }


if __name__ == "__main__":
    cases = {"bf16": ("bf16", "ieee"), "tf32": ("fp32", "tf32")}
    print(json.dumps({name: compile_all(int(sys.argv[1]), *case) for name, case in cases.items()}))

"""
Up to which density the sparse kernels are faster than dense products through an expanded α, by kind of CPU.

At so many TOKENS the sparse way is the faster one up to these densities, of A or, for grad_values, of B. The numbers
are what `hf-topkast calibrate` finds, with 2 threads and torch 2.13.0: the smaller of the crossovers at
768 × 768 and 2048 × 2048, evened out where neighbours differed by the noise of the measurement.
"""

# A row of crossovers for each dtype and product.
Crossovers = dict[str, dict[str, tuple[float, ...]]]

DTYPES = ("float32", "bfloat16")
PRODUCTS = ("forward", "grad_input", "grad_values")
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)

CROSSOVERS: dict[str, Crossovers] = {
    # AVX-512, and matrix units that multiply tiles of bf16 5–10 times as fast as fp32. 2-core Intel Xeon, 2026-11-22.
    "amx": {
        "float32": {
            "forward": (1, 0.8, 1, 0.65, 0.36, 0.3, 0.5, 0.54, 0.6),
            "grad_input": (0.05, 0.2, 0.44, 0.19, 0.19, 0.17, 0.33, 0.5, 0.55),
            "grad_values": (1, 0.9, 1, 0.54, 0.22, 0.25, 0.34, 0.36, 0.58),
        },
        "bfloat16": {
            "forward": (1, 0.46, 0.5, 0.14, 0.07, 0.02, 0.02, 0.04, 0.03),
            "grad_input": (0.24, 0.26, 0.28, 0.06, 0.03, 0.02, 0.03, 0.04, 0.03),
            "grad_values": (0.7, 0.85, 0.85, 0.28, 0.04, 0.04, 0.05, 0.08, 0.08),
        },
    },
    # AVX-512, with dot products of pairs of bf16. AMD EPYC (Zen 4), 2026-11-26.
    "avx512": {
        "float32": {
            "forward": (1, 1, 1, 0.83, 0.6, 0.66, 0.77, 0.83, 0.88),
            "grad_input": (0.09, 0.33, 0.87, 0.41, 0.33, 0.38, 0.52, 0.63, 0.82),
            "grad_values": (1, 1, 1, 0.89, 0.36, 0.37, 0.54, 0.7, 0.85),
        },
        "bfloat16": {
            "forward": (1, 0.54, 0.85, 0.33, 0.27, 0.23, 0.28, 0.31, 0.35),
            "grad_input": (1, 1, 0.8, 0.2, 0.12, 0.14, 0.19, 0.26, 0.33),
            "grad_values": (1, 1, 1, 0.43, 0.15, 0.21, 0.25, 0.3, 0.36),
        },
    },
    # AVX2, or less; torch has no fast products of bf16 there. The same CPU, kept to AVX2, 2026-11-26.
    "avx2": {
        "float32": {
            "forward": (1, 1, 1, 0.58, 0.62, 0.49, 0.7, 0.78, 0.77),
            "grad_input": (1, 1, 1, 0.58, 0.54, 0.42, 0.45, 0.58, 0.72),
            "grad_values": (1, 1, 1, 0.77, 0.26, 0.48, 0.59, 0.66, 0.57),
        },
        "bfloat16": {
            "forward": (1, 1, 1, 1, 1, 1, 1, 1, 1),
            "grad_input": (1, 1, 1, 1, 1, 1, 1, 1, 1),
            "grad_values": (1, 1, 1, 1, 1, 1, 1, 1, 1),
        },
    },
}

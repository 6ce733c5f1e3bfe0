"""
Up to which density the sparse kernels are faster than dense products through an expanded α, by kind of CPU.

At so many TOKENS the sparse way is the faster one up to these densities, of A or, for grad_values, of B. The numbers
are what `python -m benchmarks.crossover` prints, with 2 threads and torch 2.13.0: the smaller of the crossovers at
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
            "forward": (1, 1, 1, 1, 0.68, 0.29, 0.74, 0.88, 0.83),
            "grad_input": (0.41, 1, 1, 0.48, 0.37, 0.29, 0.42, 0.55, 0.88),
            "grad_values": (1, 1, 0.66, 0.84, 0.35, 0.29, 0.49, 0.5, 0.86),
        },
        "bfloat16": {
            "forward": (1, 0.44, 0.56, 0.29, 0.25, 0.19, 0.38, 0.32, 0.38),
            "grad_input": (0.51, 0.49, 0.4, 0.24, 0.18, 0.14, 0.18, 0.21, 0.28),
            "grad_values": (0.38, 0.41, 1, 0.39, 0.16, 0.21, 0.22, 0.27, 0.33),
        },
    },
    # AVX2, or less; torch has no fast products of bf16 there. The same CPU, kept to AVX2, 2026-11-26.
    "avx2": {
        "float32": {
            "forward": (1, 1, 1, 0.76, 0.55, 0.68, 0.68, 0.86, 0.82),
            "grad_input": (0.39, 1, 1, 0.4, 0.33, 0.36, 0.49, 0.5, 0.64),
            "grad_values": (1, 0.83, 0.8, 0.84, 0.32, 0.38, 0.6, 0.65, 0.67),
        },
        "bfloat16": {
            "forward": (1, 0.46, 0.86, 1, 1, 1, 1, 1, 1),
            "grad_input": (1, 0.47, 0.7, 1, 1, 1, 1, 1, 1),
            "grad_values": (1, 0.8, 0.8, 1, 1, 1, 1, 1, 1),
        },
    },
}

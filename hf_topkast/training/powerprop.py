"""
Powerpropagation (Schwarz et al. 2021, arXiv 2110.00296): trains φ in the place of a weight θ = φ·|φ|^(α−1).

Layers store θ, so that products, sets and files are those of any sparse model, and give the gradient of φ. The values
become φ for the optimizer's update alone; |φ| and |θ| have one order, so the same weights are the largest.
"""

from torch import Tensor


def trained(values: Tensor, alpha: float) -> Tensor:
    """φ = sign(θ)·|θ|^(1/α)."""
    return values.sign() * values.abs().pow(1 / alpha)


def to_trained(values: Tensor, alpha: float):
    """θ to φ, in place."""
    values.copy_(trained(values, alpha))


def to_weights(values: Tensor, alpha: float):
    """φ to θ = φ·|φ|^(α−1), in place."""
    values.copy_(values * values.abs().pow(alpha - 1))

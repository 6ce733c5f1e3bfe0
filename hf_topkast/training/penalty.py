"""The exploration penalty of the paper's §2.3, λ/2·(Σ_A θ² + Σ_{B\\A} θ²/density): pure functions of the values."""

from torch import Tensor


def penalty_of(values: Tensor, active: int, density: float) -> Tensor:
    """
    The penalty without its λ/2, a float32 scalar.

    Args:
        values (`torch.Tensor`): (|B|,), the values of A first.
        active (`int`): how many of them belong to A.
        density (`float`): what the exploration set's part is divided by.
    """
    squares = values.float().square()
    return squares[:active].sum() + squares[active:].sum() / density


def add_penalty(gradient: Tensor, values: Tensor, active: int, density: float, strength: float, scale: Tensor | None):
    """
    Adds the penalty's gradient in place, as a term of the loss would: λ·θ on A, λ·θ/density on B\\A.

    Args:
        gradient, values (`torch.Tensor`): (|B|,), the values of A first.
        active (`int`): how many of them belong to A.
        density (`float`): what the exploration set's part is divided by.
        strength (`float`): λ.
        scale (`torch.Tensor`, *optional*): what the gradient is multiplied by, and the penalty's is to be too.
    """
    for part, factor in _parts(active, density, strength):
        penalised = values[part] if scale is None else values[part] * scale.to(values.dtype)
        gradient[part].add_(penalised, alpha=factor)


def shrink(values: Tensor, active: int, density: float, strength: float):
    """Applies the penalty to the values in place, as AdamW its decay; `strength` is the learning rate times λ."""
    for part, factor in _parts(active, density, strength):
        values[part].mul_(1 - factor)


def _parts(active: int, density: float, strength: float) -> tuple[tuple[slice, float], tuple[slice, float]]:
    return (slice(None, active), strength), (slice(active, None), strength / density)

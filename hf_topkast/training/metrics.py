"""What loggers show of sparse layers under `topkast/`: pure functions of the layers and the optimizer."""

from collections.abc import Collection

from torch.optim import Optimizer

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..storage import local, sum_over_ranks
from . import powerprop
from .changes import active_here
from .penalty import penalty_of


def density_of(layers: Collection[TopKastLayer]) -> float:
    """Σ|A| / Σn over the layers."""
    return sum(layer.active_count for layer in layers) / sum(layer.numel for layer in layers)


def size_metrics(layers: Collection[TopKastLayer]) -> dict[str, float]:
    """Density and backward density of all layers together, and the share of their first reservoirs ever in A."""
    weights = sum(layer.numel for layer in layers)
    first_reservoir = [int(layer.initial_reservoir_size) for layer in layers]
    used = sum(layer.reservoir_use * size for layer, size in zip(layers, first_reservoir))
    return {
        "topkast/density": density_of(layers),
        "topkast/backward_density": sum(layer.values.numel() for layer in layers) / weights,
        "topkast/reservoir_use": used / max(1, sum(first_reservoir)),
    }


def learning_rate_metric(
    layers: Collection[TopKastLayer], optimizer: Optimizer, config: TopKastConfig
) -> dict[str, float]:
    """The rate of the sparse values, where `lr_scale` gives them one of their own and the optimizer holds any."""
    if config.lr_scale == 1:
        return {}
    values = {id(layer.values) for layer in layers if layer.values.requires_grad}
    held = [group for group in optimizer.param_groups if values & set(map(id, group["params"]))]
    return {"topkast/learning_rate": float(held[0]["lr"]) * config.lr_scale} if held else {}  # frozen ones need not be


def penalty_of_layers(layers: Collection[TopKastLayer], config: TopKastConfig, density: float) -> float:
    """
    The penalty of all trained layers, λ/2·(Σ_A θ² + Σ_{B\\A} θ²/density), in nats like the loss.

    Args:
        layers (`Collection[TopKastLayer]`): the sparse layers; frozen ones have no penalty.
        config ([`TopKastConfig`]): λ, and whether the values are powers of what is trained.
        density (`float`): what the exploration set's part is divided by.
    """
    total = 0.0
    for layer in layers:
        if not layer.values.requires_grad:
            continue
        values = local(layer.values)
        if config.powerprop_alpha != 1:
            values = powerprop.trained(values, config.powerprop_alpha)
        total += float(sum_over_ranks(penalty_of(values, active_here(layer), density), layer.values))
    return config.penalty / 2 * total

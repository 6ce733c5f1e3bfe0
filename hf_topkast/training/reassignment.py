"""Other sets for one layer at a time, with its weights and the optimizer's state in their new places."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..method import get_method
from ..sets import check_finite
from ..storage import NOWHERE, Arriving, count_from, local, raise_together
from .optimizers import carry_state, check_state


def thetas(layers: dict[str, TopKastLayer]) -> Iterator[tuple[str, TopKastLayer, Tensor]]:
    """The layers with θ of each, one at a time, while the reservoir of the next one is on its way."""
    pairs = list(layers.items())
    coming = None
    for (name, layer), following in zip(pairs, [*pairs[1:], None]):
        arriving = coming or Arriving(layer.reservoir, layer.values.device)
        coming = following and Arriving(following[1].reservoir, following[1].values.device)
        theta = layer.theta(arriving.here())
        del arriving  # its layer is about to get another one
        yield name, layer, theta


def reassign(
    layer: TopKastLayer, active: Tensor, backward: Tensor, theta: Tensor, optimizer: Optimizer, config: TopKastConfig
) -> int:
    """
    Gives a layer other sets, and the optimizer's state to its weights.

    Args:
        layer ([`TopKastLayer`]): the layer.
        active, backward (`torch.Tensor`): A and B as bool masks, (out, in).
        theta (`torch.Tensor`): its weight, (out, in).
        optimizer (`torch.optim.Optimizer`): the one that trains it.
        config ([`TopKastConfig`]): the settings.

    Returns:
        `int`: how many members of A left it.
    """
    former, members = layer.values.numel(), layer.active_count
    sources = layer.reassign(active, backward, theta)
    carry_state(optimizer, layer.values, sources, former, config.new_state, config.lr_scale)
    return members - count_from(sources[: layer.active_count], members)


def check_numbers(layers: dict[str, TopKastLayer], optimizer: Optimizer, group: dist.ProcessGroup | None):
    """
    All layers before the first one changes; what is outside B cannot have changed. Every rank has to call.

    Raises:
        ValueError: if a weight is NaN or infinite, or the optimizer keeps what cannot move; the message names the
            layer.
    """
    problem = None
    try:
        for name, layer in layers.items():
            check_finite(local(layer.values), name)
            check_state(optimizer, name, layer.values)
    except ValueError as error:
        problem = error
    raise_together(problem, group)


def check_reservoirs(layers: dict[str, TopKastLayer], method: str):
    """
    Whether the layers store outside B what the method gives new weights.

    Raises:
        ValueError: if they do not; the message names the layer.
    """
    for name, layer in layers.items():
        if (layer.reservoir_device != NOWHERE) != get_method(method).keeps_values:
            kept = "keeps" if layer.reservoir_device != NOWHERE else "does not keep"
            raise ValueError(
                f"Layer '{name}' was made sparse by a method that {kept} the weights outside B, which does not go "
                f"with method={method!r}. Densify the model and sparsify it anew with that method."
            )

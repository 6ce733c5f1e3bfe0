"""Other sets for one layer at a time, with its weights and the optimizer's state in their new places."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..method import get_method
from ..sets import Sizes, check_finite
from ..storage import NOWHERE, Arriving, Change, Matrix, local, raise_together
from .optimizers import carry_state, check_state


def reservoirs(layers: Iterable[TopKastLayer]) -> Iterator[Tensor | None]:
    """
    The reservoir of every matrix of the layers where it is needed, one at a time, while the next one is on its way;
    `None` where the layer gathers it from all ranks.
    """
    coming: deque[Arriving] = deque()
    for layer in layers:
        for rest in layer.rests():
            coming.append(Arriving(rest, layer.values.device))
            if len(coming) > 1:
                yield coming.popleft().here()
    while coming:
        yield coming.popleft().here()


def reassign(
    layer: TopKastLayer,
    sizes: Sizes,
    choose: Callable[[Matrix], tuple[Tensor, Tensor]],
    arriving: Iterator[Tensor | None],
    optimizer: Optimizer,
    config: TopKastConfig,
) -> int:
    """
    Gives a layer other sets, matrix by matrix, and the optimizer's state to its weights.

    Args:
        layer ([`TopKastLayer`]): the layer.
        sizes (`list[tuple[int, int]]`): |A| and |B| that each matrix will have, in blocks.
        choose (`Callable`): gives A and B of a matrix as bool masks, (out, in).
        arriving (`Iterator`): gives the reservoir of each, see [`reservoirs`].
        optimizer (`torch.optim.Optimizer`): the one that trains the layer.
        config ([`TopKastConfig`]): the settings.

    Returns:
        `int`: how many members of A left it.
    """
    with Change(layer, sizes) as change:
        carry_state(optimizer, change, config.new_state, config.lr_scale)

        def give(matrix: Matrix) -> int:  # which is gone when it returns, before the next one is put together
            return change.give(matrix, *choose(matrix))

        return sum(give(change.former.matrix(place, next(arriving))) for place in range(layer.matrices))


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

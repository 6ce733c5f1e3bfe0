"""Sets for a coming refresh, chosen by a thread while training goes on (`refresh_lag`)."""

import json
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..sets import Present, SetPlan, Sizes
from ..storage import Matrix, Moment, blocks_of, pack_part, raise_together, unpack_part


# What the sets depend on beside the weights, the step and the schedules.
CHOOSING_SETTINGS = (
    *("method", "density", "backward_density", "initial_density"),
    *("distribution", "density_overrides", "split_fused", "block_size", "scatter_blocks"),
    *("score", "compare"),
    *("drop_share", "drop_end", "drop_decay", "update_until", "seed"),
)


class Choice:
    """
    The sets of all layers for one refresh, complete or still being chosen.

    Args:
        key (`list`): for which step and under which settings they are chosen, as JSON types.
        sets (`dict[str, torch.Tensor]` or `Future`): A and B by layer, as packed bits, uint8, (2, ceil(n / 8)), on the
            host. A thread that fails gives its traceback, a string, in their place.
    """

    def __init__(self, key: list, sets: dict[str, Tensor] | Future):
        self.key = key
        self._sets = sets

    def sets(self) -> dict[str, Tensor]:
        """
        The sets; waits for the thread.

        Raises:
            RuntimeError: if the thread could not choose them; the message says why.
        """
        if isinstance(self._sets, Future):
            found = self._sets.result()
            if isinstance(found, str):
                raise RuntimeError(f"A thread could not choose the sets of the next refresh.\n{found}")
            self._sets = found
        return self._sets

    def taken(self, key: list, group: dist.ProcessGroup | None) -> dict[str, Tensor] | None:
        """The sets, in a dictionary to empty, if they are for this key; every rank has to call."""
        if self.key != key:
            return None
        sets, problem = None, None
        try:
            sets = dict(self.sets())
        except RuntimeError as error:
            problem = error
        raise_together(problem, group)
        return sets

    def __reduce__(self):  # of a copy, which has no thread
        return Choice, (self.key, self.sets())

    def state_dict(self) -> dict[str, Any]:
        """The key, and the sets as tensors; waits for the thread."""
        return {"key": self.key, "sets": self.sets()}


def choice_key(config: TopKastConfig, layers: list[str], step: int, left: float, explores: bool) -> list:
    """
    All that the sets of a step depend on beside the weights, as JSON types.

    Args:
        config ([`TopKastConfig`]): the settings.
        layers (`list[str]`): names of those that are trained.
        step (`int`): the optimizer step of the refresh.
        left (`float`): share of the density schedule's way that is left then.
        explores (`bool`): whether B is larger than A then.
    """
    settings = {name: getattr(config, name) for name in CHOOSING_SETTINGS}
    settings["layers"] = layers
    return [step, left, explores, json.dumps(settings)]  # of overrides the order counts


def choose_ahead(
    key: list,
    layers: dict[str, TopKastLayer],
    plan: SetPlan,
    sizes: Callable[[dict[str, Moment]], dict[str, Sizes]],
    present: Callable[[Matrix], Present],
) -> Choice:
    """
    Starts a thread that chooses sets from the weights as they are now.

    It works where the reservoir rests: with `reservoir_device="cpu"` or `"disk"` on the host, so that the accelerator
    has only to copy what it holds, values and pattern. That copy, 6 bytes for each weight of B in float32, goes layer
    by layer; the sets that are found take n / 4 bytes. At work, the thread holds θ and masks of one layer, or
    of one expert.

    Args:
        key (`list`): what the choice is for, see [`Choice`].
        layers (`dict[str, TopKastLayer]`): the layers, by name.
        plan ([`SetPlan`]): chooses the members.
        sizes (`Callable`): gives the sizes of the sets from the layers' numbers at this moment; called in the thread.
        present (`Callable`): gives what a method is told of a matrix; called in the thread.
    """
    moments = {name: layer.moment() for name, layer in layers.items()}
    on_gpu = any(moment.values.is_cuda for moment in moments.values())
    stream = torch.cuda.current_stream() if on_gpu else None  # behind what has still to be written
    thread = ThreadPoolExecutor(1, thread_name_prefix="topkast")
    choice = Choice(key, thread.submit(_choose, moments, plan, sizes, present, stream))
    thread.shutdown(wait=False)  # ends once all is done
    return choice


def taken_sets(packed: Tensor, layer: TopKastLayer) -> tuple[Sizes, Callable[[Matrix], tuple[Tensor, Tensor]]]:
    """What [`reassign`] takes of the packed sets of a layer: their sizes, and what gives those of one matrix."""

    def choose(matrix: Matrix) -> tuple[Tensor, Tensor]:
        return unpacked(packed, layer, matrix.place)

    each = (unpacked(packed, layer, place) for place in range(layer.matrices))
    return [blocks_of(*masks, layer.block_size) for masks in each], choose


def unpacked(packed: Tensor, layer: TopKastLayer, place: int = 0) -> tuple[Tensor, Tensor]:
    """A and B of a matrix of a layer as bool masks, (out, in), on its device."""
    rows, columns = layer.matrix_shape[0] // layer.matrices, layer.matrix_shape[1]
    numel = rows * columns
    active, backward = (
        unpack_part(bits, place * numel, numel).view(rows, columns) for bits in packed.to(layer.values.device)
    )
    return active, backward


@torch.no_grad()
def _choose(
    moments: dict[str, Moment], plan: SetPlan, sizes: Callable, present: Callable, stream
) -> dict[str, Tensor] | str:
    try:
        with torch.cuda.stream(stream):  # nothing without one
            wanted, chosen = sizes(moments), {}
            for name in list(moments):
                chosen[name] = _packed_sets(moments.pop(name), partial(plan.choose, name, sizes=wanted[name]), present)
    except Exception:
        return traceback.format_exc()  # the exception itself would keep θ of a layer alive until it is raised
    return chosen


def _packed_sets(moment: Moment, choose: Callable, present: Callable[[Matrix], Present]) -> Tensor:
    """The sets of a layer as packed bits, uint8, (2, ceil(n / 8)), chosen one matrix after another."""
    packed = torch.zeros(2, -(-moment.pattern.numel // 8), dtype=torch.uint8, device="cpu")

    def put(matrix: Matrix):  # which is gone when it returns
        for bits, mask in zip(packed, choose(theta=matrix.scored(), present=present(matrix), place=matrix.place)):
            first, own = pack_part(mask, matrix.place * mask.numel())
            bits[first : first + len(own)].bitwise_or_(own.cpu())

    for place in range(moment.matrices):
        put(moment.matrix(place))
    return packed

"""Sets for a coming refresh, chosen by a thread while training goes on (`refresh_lag`)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .base_layer import TopKastLayer
from .pattern import pack_bits, unpack_bits
from .plan import SetPlan, Sizes
from .storage import Moment


def choose_ahead(
    layers: dict[str, TopKastLayer], plan: SetPlan, sizes: Callable[[dict[str, Moment]], dict[str, Sizes]]
):
    """
    Starts a thread that chooses sets from the present weights and leaves them in each layer's `next_sets`.

    It works where the reservoir rests: with `reservoir_device="cpu"` or `"disk"` on the host, so that nothing but a
    copy of the values waits for the accelerator. Until a layer's turn has come that copy takes |B| numbers, and the
    sets that are found n / 4 bytes.

    Args:
        layers (`dict[str, TopKastLayer]`): the layers, by name.
        plan ([`SetPlan`]): chooses the members.
        sizes (`Callable`): gives the sizes of the sets from the layers' numbers at this moment; called in the thread.
    """
    moments = {name: layer.moment() for name, layer in layers.items()}
    thread = ThreadPoolExecutor(1, thread_name_prefix="topkast")
    found = thread.submit(sizes, moments)
    for name, layer in layers.items():
        layer.next_sets = thread.submit(_choose, name, plan, moments, found)
    thread.shutdown(wait=False)  # ends once all is done


def take_next_sets(layer: TopKastLayer) -> tuple[Tensor, Tensor] | None:
    """A and B that were chosen ahead for a layer, once: bool masks, (out, in), or `None` if none were."""
    packed, layer.next_sets = layer.next_sets, None
    if packed is None:
        return None
    active, backward = (unpack_bits(bits, layer.numel).view(layer.shape) for bits in packed.to(layer.values.device))
    return active, backward


@torch.no_grad()
def _choose(name: str, plan: SetPlan, moments: dict[str, Moment], sizes: Future) -> Tensor:
    theta = moments.pop(name).theta()
    return torch.stack([pack_bits(mask) for mask in plan.choose(name, theta, sizes.result()[name])]).cpu()

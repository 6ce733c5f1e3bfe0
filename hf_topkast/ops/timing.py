"""Timing products against each other: in turn, on random layers, by the ratios of each round."""

import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch

from ..storage import Pattern, spread_blocks
from . import implementation


def clock(device: str = "cpu") -> float:
    """Seconds, read when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", calls: int = 1
) -> dict[str, list[float]]:
    """
    Times functions in turn, round by round, so that whatever disturbs the machine meets all of them.

    Args:
        runs (`dict[str, Callable]`): what to time, by name; each is called once before the clock starts.
        rounds (`int`): timings of each.
        device (`str`, *optional*, defaults to `"cpu"`): where they run; `"cuda"` is waited for.
        calls (`int`, *optional*, defaults to 1): calls in a timing. On a GPU several hide the way from host to device.

    Returns:
        `dict[str, list[float]]`: seconds of a call, for each round, by name.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock(device)
            for _ in range(calls):
                run()
            seconds[name].append((clock(device) - start) / calls)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of one time over the other of the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


class RandomLayer:
    """
    A layer with random sets of exact densities and random numbers, to time products with.

    Args:
        shape (`tuple[int, int]`): (out, in).
        tokens (`int`): rows of its inputs.
        density (`float`): of A; B is `backward_density`, by default the same.
        dtype (`torch.dtype`): of everything.
        block_size (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): rows and columns of a block.
        device (`str`, *optional*, defaults to `"cpu"`): where everything is.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tokens: int,
        density: float,
        backward_density: float | None = None,
        dtype: torch.dtype = torch.float32,
        block_size: tuple[int, int] = (1, 1),
        device: str = "cpu",
    ):
        generator = torch.Generator(device).manual_seed(0)
        grid = [size // side for size, side in zip(shape, block_size)]
        order = torch.rand(grid, generator=generator, device=device).flatten().argsort()
        masks = []
        for share in (density, density if backward_density is None else backward_density):
            mask = torch.zeros(order.numel(), dtype=torch.bool, device=device)
            mask[order[: max(1, round(share * order.numel()))]] = True
            masks.append(spread_blocks(mask.view(*grid), block_size))
        self.pattern = Pattern.from_masks(*masks, block_size)

        def randoms(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.values = randoms(self.pattern.stored)
        self.x, self.dy = randoms(tokens, shape[1]), randoms(tokens, shape[0])

    def products(self, backend: ModuleType) -> dict[str, Callable[[], torch.Tensor]]:
        """The three masked products by a backend, by name."""
        return {
            "forward": lambda: backend.forward(self.x, self.values, self.pattern, None),
            "grad_input": lambda: backend.grad_input(self.dy, self.values, self.pattern),
            "grad_values": lambda: backend.grad_values(self.dy, self.x, self.pattern),
        }

    def chosen(self) -> dict[str, ModuleType]:
        """The backends that a layer would take for the three products, by name."""
        operands = {"forward": self.x, "grad_input": self.dy, "grad_values": self.x}
        return {name: implementation("auto", name, x, self.pattern) for name, x in operands.items()}

    def chosen_products(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The three masked products by those."""
        return {name: self.products(backend)[name] for name, backend in self.chosen().items()}

    def dense_products(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The three products of the dense layer of the same shape."""
        weight = torch.randn(self.pattern.shape, device=self.x.device).to(self.x.dtype)
        return {
            "forward": lambda: self.x @ weight.T,
            "grad_input": lambda: self.dy @ weight,
            "grad_values": lambda: self.dy.T @ self.x,
        }

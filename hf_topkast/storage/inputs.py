"""How large a layer's inputs are, feature by feature."""

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import world_size


class InputSquares:
    """
    Sums of squares of each input feature over tokens, and how many these were.

    Args:
        device (`torch.device`): where they are kept.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.forget()

    @torch.no_grad()
    @torch.compiler.disable
    def add(self, *inputs: Tensor):
        """Takes in a product's inputs, see `_measure`."""
        self._take(self._measure(*inputs))

    @torch.compiler.disable
    def add_if_trained(self, y: Tensor, *inputs: Tensor):
        """The same once a gradient comes back to the product's outputs: not of passes that are looked at only."""
        with torch.no_grad():
            measured = self._measure(*inputs)
        y.register_hook(lambda _: self._take(measured))

    def _take(self, measured: Tensor):
        self._total = measured if self._total is None else self._total + measured

    def _measure(self, x: Tensor) -> Tensor:
        """Of inputs, (..., in_features): (in_features + 1,), the tokens last."""
        rows = x.detach().reshape(-1, x.shape[-1])
        squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(0)
        return torch.cat([squares, squares.new_tensor([len(rows)])]).to(self._device)

    def over_ranks(self, like: Tensor, group: dist.ProcessGroup | None = None):
        """Adds up what all ranks have seen; every rank has to call. `like` has the shape of the norms."""
        if world_size(group) > 1:
            shape = (*like.shape[:-1], like.shape[-1] + 1)
            total = torch.zeros(shape, dtype=torch.float64, device=self._device)
            if self._total is not None:
                total += self._total
            dist.all_reduce(total, group=group)
            self._total = total.to(torch.promote_types(like.dtype, torch.float32))

    def forget(self):
        """Begins anew."""
        self._total = None

    @property
    def tokens(self) -> int:
        """How many were seen."""
        return 0 if self._total is None else int(self._total[..., -1].sum())

    def seen(self) -> Tensor:
        """Whether there was a token: bool, (), or of each expert, (experts,)."""
        return self._total[..., -1] > 0

    def mean(self) -> Tensor:
        """Mean square of each feature, (..., in_features), float32 or wider; 0 without tokens."""
        mean = self._total[..., :-1] / self._total[..., -1:].clamp(min=1)
        return mean if mean.dtype == torch.float64 else mean.float()

    def follow(self, norms: Tensor, kept: float) -> Tensor:
        """
        Running norms that keep this share of their mean squares and take the rest from what was seen. Those of an
        expert without tokens stay.
        """
        mean = self.mean()
        following = (kept * norms.to(mean.dtype).square() + (1 - kept) * mean).sqrt()
        return torch.where(self.seen().unsqueeze(-1), following, norms.to(mean.dtype))


class ExpertSquares(InputSquares):
    """The same for every expert of a layer, over the tokens that come to it."""

    def _measure(self, x: Tensor, ends: Tensor) -> Tensor:
        """
        Of inputs, (rows, in_features), sorted by expert, and the end of each expert's rows, (experts,): (experts,
        in_features + 1), the tokens last.
        """
        x = x.detach()
        places = torch.arange(len(x), dtype=ends.dtype, device=ends.device)
        owner = torch.searchsorted(ends, places, right=True)
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        # Rows of zeros are tokens that a model sends to an expert without having chosen it.
        rows = torch.cat([squares, squares.any(1, keepdim=True).to(squares.dtype)], 1)
        return rows.new_zeros(len(ends) + 1, rows.shape[1]).index_add_(0, owner, rows)[:-1].to(self._device)

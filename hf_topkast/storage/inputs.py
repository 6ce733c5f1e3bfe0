"""How large a layer's inputs are, feature by feature."""

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import world_size


class InputSquares:
    """
    Sums of squares of each input feature over tokens.

    Args:
        device (`torch.device`): where they are kept.
    """

    def __init__(self, device: torch.device):
        self._device, self._sum = device, None
        self.tokens = 0

    @torch.no_grad()
    @torch.compiler.disable
    def add(self, x: Tensor):
        """Takes in (..., in_features)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        squares = rows.to(wide).square().sum(0).to(self._device)
        self._sum = squares if self._sum is None else self._sum + squares
        self.tokens += len(rows)

    def over_ranks(self, like: Tensor, group: dist.ProcessGroup | None = None):
        """Adds up what all ranks have seen; every rank has to call. `like` has the number of features."""
        if world_size(group) > 1:
            total = torch.zeros(len(like) + 1, dtype=torch.float64, device=self._device)
            if self._sum is not None:
                total[:-1], total[-1] = self._sum, self.tokens
            dist.all_reduce(total, group=group)
            self._sum, self.tokens = total[:-1].to(like.dtype), int(total[-1])

    def forget(self):
        """Begins anew."""
        self._sum, self.tokens = None, 0

    def mean(self) -> Tensor:
        """Mean square of each feature, (in_features,), float32 or wider; needs a token."""
        return _wide(self._sum / self.tokens)

    def follow(self, norms: Tensor, kept: float) -> Tensor:
        """Running norms that keep this share of their mean squares and take the rest from what was seen."""
        mean = self.mean()
        return (kept * norms.to(mean.dtype).square() + (1 - kept) * mean).sqrt()


class ExpertSquares:
    """
    The same for every expert of a layer, over the tokens that come to it.

    Args:
        device (`torch.device`): where they are kept.
    """

    def __init__(self, device: torch.device):
        self._device, self._total = device, None

    @torch.no_grad()
    @torch.compiler.disable
    def add(self, x: Tensor, ends: Tensor):
        """Takes in (rows, in_features), sorted by expert, and the end of each expert's rows, (experts,)."""
        x = x.detach()
        places = torch.arange(len(x), dtype=ends.dtype, device=ends.device)
        owner = torch.searchsorted(ends, places, right=True)
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        # Rows of zeros are tokens that a model sends to an expert without having chosen it.
        rows = torch.cat([squares, squares.any(1, keepdim=True).to(squares.dtype)], 1)
        total = rows.new_zeros(len(ends) + 1, rows.shape[1]).index_add_(0, owner, rows)[:-1].to(self._device)
        self._total = total if self._total is None else self._total + total

    def over_ranks(self, like: Tensor, group: dist.ProcessGroup | None = None):
        """Adds up what all ranks have seen; every rank has to call. `like` is (experts, in_features)."""
        if world_size(group) > 1:
            total = torch.zeros(len(like), like.shape[1] + 1, dtype=torch.float64, device=self._device)
            if self._total is not None:
                total += self._total
            dist.all_reduce(total, group=group)
            self._total = total.to(torch.promote_types(like.dtype, torch.float32))

    def forget(self):
        """Begins anew."""
        self._total = None

    @property
    def tokens(self) -> int:
        """How many came to any expert."""
        return 0 if self._total is None else int(self.seen().sum())

    def seen(self) -> Tensor:
        """Which experts have had a token: bool, (experts,)."""
        return self._total[:, -1] > 0

    def mean(self) -> Tensor:
        """Mean squares, (experts, in_features), float32 or wider; 0 for an expert without tokens."""
        return _wide(self._total[:, :-1] / self._total[:, -1:].clamp(min=1))

    def follow(self, norms: Tensor, kept: float) -> Tensor:
        """Running norms, (experts, in_features), as [`InputSquares.follow`]; an expert without tokens keeps its."""
        mean = self.mean()
        following = (kept * norms.to(mean.dtype).square() + (1 - kept) * mean).sqrt()
        return torch.where(self.seen()[:, None], following, norms.to(mean.dtype))


def _wide(mean: Tensor) -> Tensor:
    return mean if mean.dtype == torch.float64 else mean.float()

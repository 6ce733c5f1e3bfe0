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
        mean = self._sum / self.tokens
        return mean if mean.dtype == torch.float64 else mean.float()

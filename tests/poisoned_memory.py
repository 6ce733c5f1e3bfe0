"""Memory that is not what was written to it: what a kernel leaves out, or reads where nothing is, shows."""

from collections.abc import Callable

import pytest
import torch


def runs_on_poisoned_memory(run: Callable[[], tuple], monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls `run` twice, each time with new tensors of `torch.empty` full of other numbers."""
    empty, poison = torch.empty, {}

    def poisoned(*size, **settings):
        tensor = empty(*size, **settings)
        return tensor.fill_(poison["float"] if tensor.is_floating_point() else poison["index"])

    monkeypatch.setattr(torch, "empty", poisoned)
    runs = []
    for number, index in ((float("nan"), 1), (1e30, 0)):
        poison.update({"float": number, "index": index})
        runs.append(run())
    return runs

"""
A way past the blocks of a model that are done with: they compute nothing, and the last of them gives what it gave.

What takes a model block by block would else run the first ones again for each that follows.
"""

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Shortcut:
    """
    The blocks of a model that are done with, in order, and what the last of them gave for each batch.

    A pass by it runs the last block, which may have changed since the pass before, and none of those before it. It is
    as good as a whole pass where every block reads the output of the one before it, and nothing of older ones.

    Args:
        model (`torch.nn.Module`): the model.
        open (`bool`): whether to note outputs at all, which a way that is not to be taken does without.
    """

    def __init__(self, model: nn.Module, open: bool):
        self.model = model
        self.open = open
        self.done: list[nn.Module] = []
        self.last: dict[int, Any] = {}  # outputs of the last block, by batch
        self.before: dict[int, Any] = {}  # of the one before it

    @property
    def saves(self) -> bool:
        """Whether there is a block to pass by."""
        return self.open and len(self.done) > 1

    def add(self, path: str):
        """Counts the block at `path` as done with; where no module is, there is no way past it."""
        self.before, self.last = self.last, {}
        try:
            self.done.append(self.model.get_submodule(path))
        except AttributeError:
            self.close()

    def close(self):
        """From now on it is not taken."""
        self.open = False
        self.before, self.last = {}, {}

    @contextlib.contextmanager
    def passing(self, batch: int, short: bool):
        """Within it the model runs as short as it can, or the whole way; what the last block gives is noted."""
        *past, last = self.done if self.open and self.done else [nn.Module()]
        past = past if short else []
        forwards = [block.__dict__.get("forward") for block in past]
        hook = last.register_forward_hook(lambda module, args, output: self.last.update({batch: _copy(output)}))
        try:
            for block in past:
                block.forward = lambda *args, **kwargs: _copy(self.before[batch])
            yield
        finally:
            hook.remove()
            for block, forward in zip(past, forwards):
                del block.forward
                if forward is not None:
                    block.forward = forward


def _copy(output: Any) -> Any:
    """A block's output, without tensors that what follows may change in their place."""
    return tree_map(lambda each: each.detach().clone() if isinstance(each, Tensor) else each, output)

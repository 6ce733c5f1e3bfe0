"""Steps of an optimizer that end in an error: torch calls no hook then, and something may have to be put back."""

from collections.abc import Callable
from functools import wraps
from types import MethodType

from torch.optim import Optimizer


class StepGuard:
    """
    Calls a function when a step of an optimizer ends in an error, whatever it is; the error goes on its way.

    It stands in for `optimizer.step`, as schedulers do, which may come before or after it. Who has kept the method of
    before and calls that is not guarded: Accelerate's gradient scaler does, if the guard comes later.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        put_back (`Callable`): takes nothing; called once for each step that fails.
    """

    def __init__(self, optimizer: Optimizer, put_back: Callable[[], None]):
        self._optimizer, self._former = optimizer, optimizer.__dict__.get("step")
        step = optimizer.step

        @wraps(step)  # with what schedulers note on it
        def guarded(optimizer, *args, **kwargs):
            try:
                return step(*args, **kwargs)
            except BaseException:  # a keyboard interrupt as well
                put_back()
                raise

        self._guarded = guarded
        optimizer.step = MethodType(guarded, optimizer)

    def remove(self):
        """Gives `optimizer.step` back, if nothing else stands in for it by now."""
        if getattr(self._optimizer.step, "__func__", None) is not self._guarded:
            return
        if self._former is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._former

"""
SMET (arXiv 2606.00888): SET with an optimizer state that starts anew with each weight.

Settings: theirs, 20% of A every 100 steps, by a cosine to 0.5% at the end of training; step counts of Adam from each
weight's own entry, and 100 steps of warm-up. They also take a learning rate in proportion to 1 / density, which is
`lr_scale` here.
"""

from ...config import TopKastConfig
from ...method import Method
from .set_ import choose


def _drop_end(config: TopKastConfig) -> float:
    """0.5% of A, where the share falls and was more at first."""
    falls = config.drop_decay in (None, "cosine")
    return min(0.005, 0.005 if config.drop_share is None else config.drop_share) if falls else 0.0


def _new_state_warmup(config: TopKastConfig) -> int:  # no lambda: a copy of the controller is pickled with it
    return 100 if config.new_state in (None, "fresh") else 0


METHOD = Method(
    choose,
    keeps_values=False,
    defaults={
        "drop_share": 0.2,
        "drop_end": _drop_end,
        "drop_decay": "cosine",
        "update_until": 1.0,
        "new_state": "fresh",
        "new_state_warmup": _new_state_warmup,
    },
    source="SMET, [arXiv 2606.00888](https://arxiv.org/abs/2606.00888)",
)

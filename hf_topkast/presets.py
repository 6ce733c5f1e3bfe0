"""Settings that did best, by what is trained."""

import math
from typing import TYPE_CHECKING, Any

from .method import get_method


if TYPE_CHECKING:
    from typing_extensions import Self


# Share of a fine-tuning's weights that is explored beside A.
EXPLORATION = 0.1


class Presets:
    """What [`TopKastConfig`] offers for those who do not want to look for settings."""

    density: float | str | None
    if TYPE_CHECKING:  # the dataclass has its own

        def __init__(self, **settings: Any) -> None: ...

    @classmethod
    def for_pretraining(cls, density: float | str = 0.2, **settings: Any) -> "Self":
        """
        What did best for new weights in short trainings of small models (docs/results.md, recipes/paper/gap_cpu.yaml
        and gap_large_cpu.yaml), beside AdamW's weight decay of 0.1 for everything else: steps of the exploration set
        times 0.3, and a decoupled penalty of 0.03. The class itself has the paper's full steps, and its penalty in the
        gradient.

        Args:
            density (`float` or `str`, *optional*, defaults to 0.2): as of the class.
            **settings: any other fields, which win.

        Example:

        ```python
        sparsify(model, TopKastConfig.for_pretraining(0.1))
        ```
        """
        settings = {"penalty": 0.03, "penalty_mode": "decoupled", **settings}
        if get_method(settings.get("method", "topkast")).explores:
            settings = {"exploration_lr_scale": 0.3, **settings}
        return cls(density=density, **settings)

    @classmethod
    def for_finetuning(cls, density: float | str = 0.5, **settings: Any) -> "Self":
        """
        What did best for pretrained weights in short trainings (docs/fine_tuning.md): sets that never change, and no
        penalty, which pulls weights to zero. Best with `sparsify(..., calibration=batches)`.

        Args:
            density (`float` or `str`, *optional*, defaults to 0.5): as of the class.
            **settings: any other fields, which win. With a method that explores, such as `method="topkast"`, B is a
                tenth of the weights larger than A: twice as large takes more memory at 0.5 than a dense model.

        Example:

        ```python
        sparsify(model, TopKastConfig.for_finetuning(0.5), calibration=batches)
        ```
        """
        settings = {"method": "static", "penalty": 0.0, **settings}
        ratio = get_method(settings["method"]).backward_ratio
        density = cls(density=density).density  # from the command line it is text
        if density != "nonzero" and 1 < ratio < math.inf:
            settings = {"backward_density": min(1.0, density + EXPLORATION), **settings}
        return cls(density=density, **settings)

"""The output directory of a training: Trainer's log, the recipe's results, our settings and layers."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..layer_log import read_layers


STATE, RESULTS, SETTINGS = "trainer_state.json", "results.json", "topkast_config.json"
# How the recipes, and Trainer's evaluations, name what a model is worth; less is better.
QUALITIES = {"bits_per_byte": "bits per byte", "word_perplexity": "perplexity per word"}


@dataclass
class Run:
    """
    One training.

    Attributes:
        name (`str`): its directory's.
        directory (`Path`): where it is.
        history (`list[dict]`): Trainer's log.
        results (`dict`): what the recipe measured at the end; empty for other trainings.
        settings (`dict`): those of its sparsity; empty for a dense run.
        layers (`list[dict]`): the entries of its [`TopKastLayerLogger`], if it had one.
    """

    name: str
    directory: Path
    history: list[dict[str, Any]]
    results: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """Steps and values of a logged metric."""
        return [(entry["step"], entry[key]) for entry in self.history if _is_number(entry.get(key))]

    def last(self, key: str) -> float | None:
        """The last value of a logged metric, or the one in the results; `None` if there is neither."""
        if _is_number(self.results.get(key)):
            return self.results[key]
        points = self.series(key)
        return points[-1][1] if points else None

    @property
    def sparse(self) -> bool:
        """Whether any layer was sparse."""
        return bool(self.settings) or bool(self.series("topkast/density"))

    @property
    def density(self) -> float | None:
        """Of the sparse layers at the end; 1 for a dense run, `None` where neither the log nor the settings tell."""
        return self._share("density")

    @property
    def backward_density(self) -> float | None:
        """The same of B."""
        return self._share("backward_density")

    @property
    def seconds(self) -> float | None:
        """How long it trained."""
        return self.results.get("train_seconds") or self.last("train_runtime")

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.results.get("steps") or max((entry.get("step", 0) for entry in self.history), default=0)

    def _share(self, key: str) -> float | None:
        if not self.sparse:
            return 1.0
        points = self.series(f"topkast/{key}")
        found = self.results.get(key) or (points[-1][1] if points else self.settings.get(key))
        return found if _is_number(found) else None  # of a pruned model the settings say "nonzero"

    def to_dict(self) -> dict[str, Any]:
        """What is told in numbers, as JSON types."""
        return {
            "name": self.name,
            "directory": str(self.directory),
            "steps": self.steps,
            "seconds": self.seconds,
            "density": self.density,
            "backward_density": self.backward_density,
            "loss": self.last("loss"),
            "results": self.results,
            "settings": self.settings,
            "layer_entries": len(self.layers),
        }


def read_run(directory: str | os.PathLike) -> Run:
    """
    Reads the output directory of a Trainer run, whole or still going on; it may also be one of its checkpoints.

    Raises:
        ValueError: if there is no log of Trainer's.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}: give the output_dir of a training.")
    places = [directory, *sorted(directory.glob("checkpoint-*"), key=_step_of, reverse=True)]
    place = next((place for place in places if (place / STATE).is_file()), None)
    if place is None:
        raise ValueError(
            f"{directory} holds no {STATE}, nor does a checkpoint in it: give the output_dir of a training."
        )
    history = _read(place / STATE).get("log_history", [])
    results, settings = (_read(directory / name) or _read(place / name) for name in (RESULTS, SETTINGS))
    return Run(directory.resolve().name, directory, history, results, settings, read_layers(directory))


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with their paths as names where two directories have one name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.directory)
    return list(runs)


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

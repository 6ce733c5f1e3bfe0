"""
What a sweep consists of: the YAML file read, checked and expanded into rows and runs. Pure functions of the file and
of the results so far; see sweep.py for the format.
"""

import dataclasses
import itertools
import math
import re
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from arguments import DATACLASSES, FineTuningArguments, parse_arguments, refuse_unknown_keys
from fine_tuning import settle_fine_tuning
from sweep_yaml import dump_yaml, load_yaml
from transformers import TrainingArguments

from hf_topkast import TopKastConfig


# Under everything: no sample text, no bars in log files.
DEFAULTS = {"sample_tokens": 0, "disable_tqdm": True, "report_to": "none", "save_total_limit": 1}
OF_THE_SWEEP = {"seed": "give `seeds`", "output_dir": "give it at the top", "resume": "the sweep resumes by itself"}
SWEEP_KEYS = {"output_dir", "base", "settings", "rows", "grid", "tune", "seeds", "seeds_everywhere", "seeds_within"}
SWEEP_KEYS |= {"keep_models", "like", "overrides"}
FIELDS = {spec.name for cls in DATACLASSES for spec in fields(cls) if spec.init}
# What a dense row has no use for.
SPARSE_FIELDS = {spec.name for cls in (TopKastConfig, FineTuningArguments) for spec in fields(cls)}
SPARSE_FIELDS -= {spec.name for spec in fields(TrainingArguments)}


@dataclass(frozen=True)
class Run:
    """One training: the row that it is of, its value of the tuned field, its seed, all its settings, its directory."""

    row: str
    value: Any
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row}, {self.folder.parent.name.replace('-', ' ', 1)}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """One row of the table: its settings but for the tuned field, and the values to choose that from."""

    name: str
    settings: dict[str, Any]
    values: list[Any]


@dataclass
class Sweep:
    """A sweep file, read and checked."""

    output_dir: Path
    rows: list[Row]
    tune: str = "learning_rate"
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    seeds_everywhere: bool = False
    seeds_within: float = 0.0
    keep_models: bool = False

    def run(self, row: Row, value: Any, seed: int) -> Run:
        """The run of one value and one seed."""
        given = {} if value is None else {self.tune: value}
        folder = self.output_dir / slug(row.name) / (slug(f"{self.tune}-{value}") if given else "as-given")
        folder /= f"seed-{seed}"
        return Run(row.name, value, seed, {**row.settings, **given, "seed": seed, "output_dir": str(folder)}, folder)

    def first_runs(self, row: Row) -> list[Run]:
        """The runs that are wanted whatever comes out: all values, with the first seed or with all."""
        seeds = self.seeds if self.seeds_everywhere else self.seeds[:1]
        return [self.run(row, value, seed) for seed in seeds for value in row.values]

    def contenders(self, row: Row, finished: dict[Path, dict]) -> list[Any]:
        """The values that the other seeds are wanted of: none while a run of the first seed is missing."""
        if self.seeds_everywhere:
            return row.values
        first = self.first_runs(row)
        if any(run.folder not in finished for run in first):
            return []
        scores = [valid_score(finished[run.folder]) for run in first]
        limit = min(scores) + self.seeds_within
        close = [run.value for run, score in zip(first, scores) if score <= limit]
        return close if math.isfinite(limit) else close[:1]

    def wanted_runs(self, row: Row, finished: dict[Path, dict]) -> list[Run]:
        """The runs that are wanted as far as it is known: once the first seed is through, the others of the best."""
        more = [self.run(row, value, seed) for seed in self.seeds[1:] for value in self.contenders(row, finished)]
        return list({run.folder: run for run in self.first_runs(row) + more}.values())

    def total_runs(self, row: Row, finished: dict[Path, dict]) -> int:
        """How many runs the row will have in the end; those of a single best value while it is not known."""
        contenders = len(self.contenders(row, finished)) or 1
        return len(row.values) + contenders * (len(self.seeds) - 1)

    def best_value(self, row: Row, finished: dict[Path, dict]) -> tuple[Any] | None:
        """The value with the best mean of the valid metric, in a tuple; `None` while a wanted run is missing."""
        if any(run.folder not in finished for run in self.wanted_runs(row, finished)):
            return None

        def mean(value: Any) -> float:
            scores = [valid_score(finished[self.run(row, value, seed).folder]) for seed in self.seeds]
            return sum(scores) / len(scores)

        return (min(self.contenders(row, finished), key=mean),)

    def is_at_edge(self, row: Row, value: Any) -> bool:
        """Whether a number is the smallest or the largest of those tried, so that a better one may lie beyond."""
        numbers = all(isinstance(other, int | float) and not isinstance(other, bool) for other in row.values)
        return numbers and len(row.values) > 1 and value in (min(row.values), max(row.values))


def metric_of(results: dict[str, Any]) -> str:
    """`"bits_per_byte"` or `"word_perplexity"`, whichever a run counted. Of both, less is better."""
    return next(name for name in ("bits_per_byte", "word_perplexity") if f"valid_{name}" in results)


def valid_score(results: dict[str, Any]) -> float:
    """The metric on the valid split; a training that diverged is worse than any number."""
    score = results[f"valid_{metric_of(results)}"]
    return score if math.isfinite(score) else math.inf


def slug(name: str) -> str:
    """A name as a directory's."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.") or "-"


def read_sweep(path: str | Path, overrides: dict[str, Any] | None = None) -> Sweep:
    """
    Reads, checks and expands a sweep file.

    Args:
        path (`str` or `Path`): The YAML file.
        overrides (`dict[str, Any]`, *optional*): Keys of the sweep, or fields for every run, that win over the file.

    Raises:
        `ValueError`: If anything in it cannot be run; the message names the row, the field and the way out.
    """
    path = Path(path)
    content = _load_sweep(path)
    given = overrides or {}
    content |= {key: value for key, value in given.items() if key in SWEEP_KEYS}
    for key in ("rows", "settings", "grid", "overrides"):
        _check_mapping(content.get(key), f"`{key}` of `{path}`")
    overrides = {**(content.get("overrides") or {})}
    overrides |= {key: value for key, value in given.items() if key not in SWEEP_KEYS}
    for key in ("output_dir", "rows"):
        if not content.get(key):
            raise ValueError(f"`{path}` has no `{key}`: see the top of recipes/sweep.py for what a sweep file holds.")
    sweep = Sweep(Path(str(content["output_dir"])), rows=[])
    for key in ("tune", "seeds", "seeds_everywhere", "seeds_within", "keep_models"):
        setattr(sweep, key, content.get(key, getattr(sweep, key)))
    for key in ("seeds_everywhere", "keep_models"):
        if not isinstance(getattr(sweep, key), bool):
            raise ValueError(f"`{key}: {getattr(sweep, key)!r}` in `{path}` is neither true nor false.")
    whole = isinstance(sweep.seeds, list) and all(isinstance(seed, int) for seed in sweep.seeds)
    if not whole or not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(
            f"`seeds: {sweep.seeds}` in `{path}` is not a list of different whole numbers, such as [0, 1]."
        )
    within = sweep.seeds_within
    if isinstance(within, bool) or not isinstance(within, int | float) or not within >= 0:
        raise ValueError(f"`seeds_within: {within}` in `{path}` is not a distance in the metric, such as 0.03.")
    _check_fields({str(sweep.tune): None}, f"`tune` of `{path}`")
    _check_fields(overrides, f"`overrides` of `{path}` or --set")
    _check_fields(content.get("settings"), f"`settings` of `{path}`")
    _check_fields(content.get("grid"), f"`grid` of `{path}`")
    for name, row in content["rows"].items():
        _check_mapping(row, f"row `{name}` of `{path}`")
        sweep.rows += _expand_row(str(name), {**(row or {})}, content, overrides, sweep.tune, path)
    _check_runs(sweep, path)
    return sweep


def _load_sweep(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A sweep file over the one that it is like, bases as paths of their own."""
    if path.resolve() in above:
        raise ValueError(f"`{path}` is `like` itself, by way of others or not: give another file, or leave it out.")
    content = load_yaml(path)
    _refuse_foreign_keys(content, SWEEP_KEYS, f"`{path}`")
    rows = content.get("rows") or {}
    for holder in (content, *(rows.values() if isinstance(rows, dict) else ())):
        if isinstance(holder, dict) and holder.get("base"):
            holder["base"] = path.parent / str(holder["base"])
    if "like" not in content:
        return content
    return {**_load_sweep(path.parent / str(content["like"]), (*above, path.resolve())), **content}


def _expand_row(
    name: str, row: dict[str, Any], content: dict[str, Any], overrides: dict[str, Any], tune: str, path: Path
) -> list[Row]:
    """A row of the file as rows of the table: one for each combination of its lists and those of `grid`."""
    base = row.pop("base", content.get("base"))
    _check_fields(row, f"row `{name}` of `{path}`")
    plain = {**DEFAULTS, **(load_yaml(Path(base)) if base else {})}
    _refuse_foreign_keys(plain, FIELDS, f"`{base}`, the base of `{path}`")
    given: dict[str, Any] = {}
    for layer in (content.get("settings") or {}, row, overrides):
        given = _merged(given, layer)
    dense = {**plain, **given}.get("sparse") is False
    for key, values in (content.get("grid") or {}).items():
        if key not in row and key not in overrides and not (dense and key in SPARSE_FIELDS):
            given[key] = values
    for key, values in given.items():
        if values == []:
            raise ValueError(f"Row `{name}` of `{path}`: `{key}` has an empty list, so it has no run. Give values.")
    varied = {key: values for key, values in given.items() if isinstance(values, list) and key != tune}
    fixed = {key: value for key, value in given.items() if key not in varied}
    rows = []
    for combination in itertools.product(*varied.values()):
        chosen = dict(zip(varied, combination))
        long_name = ", ".join([name, *(f"{key} {value}" for key, value in chosen.items() if len(varied[key]) > 1)])
        settings = _merged(plain, fixed | chosen)
        values = settings.pop(tune, None)
        values = values if isinstance(values, list) else [values]
        for key in OF_THE_SWEEP:  # the base is an ordinary file of one run, and has them
            settings.pop(key, None)
        rows.append(Row(long_name, settings, values))
    return rows


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Fields over fields; of two mappings, such as `config_overrides`, key by key."""
    both = {key: {**under[key], **value} for key, value in over.items() if _mappings(under.get(key), value)}
    return {**under, **over, **both}


def _mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _check_mapping(value: Any, place: str) -> None:
    if not (value is None or isinstance(value, dict)):
        raise ValueError(f"In {place}: `{value}` is not a list of `name: value` lines.")


def _check_fields(keys: dict[str, Any] | None, place: str) -> None:
    """Fields of a run that a sweep file may set."""
    for key in keys or ():
        if key in OF_THE_SWEEP:
            raise ValueError(f"In {place}: `{key}` is not for single runs of a sweep: {OF_THE_SWEEP[key]}.")
    _refuse_foreign_keys(keys or (), FIELDS, place)


def _refuse_foreign_keys(keys: Any, known: Any, place: str) -> None:
    try:
        refuse_unknown_keys([str(key) for key in keys], set(known), "sweep")
    except ValueError as error:
        problem = str(error).partition(": ")[2]
        raise ValueError(f"In {place}, not a field: {problem}") from error


def _check_runs(sweep: Sweep, path: Path) -> None:
    """Whether each run's settings are what run_clm.py accepts, and its directory its own."""
    seen: dict[Path, str] = {}
    for row in sweep.rows:
        for run in sweep.first_runs(row):
            if run.folder in seen:
                raise ValueError(
                    f"`{path}`: `{seen[run.folder]}` and `{run.name}` have the same directory, `{run.folder}`. "
                    "Rename a row, or drop one of the values."
                )
            seen[run.folder] = run.name
            if run.seed == sweep.seeds[0]:
                try:
                    parse_run(run)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"`{path}`, {run.name}: {error}") from error
                except SystemExit as error:  # of argparse, which has said why
                    raise ValueError(f"`{path}`, {run.name}: a value cannot be read, see above.") from error


def parse_run(run: Run) -> tuple:
    """
    The settings of a run as run_clm.py reads them, see [`parse_arguments`].

    Raises:
        `ValueError`: If it would refuse them.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump_yaml(run.settings), encoding="utf-8")
        parsed = parse_arguments([str(path)])
    model_args, _, _, topkast, _, tuning = parsed
    settle_fine_tuning(tuning, topkast, model_args.sparse, model_args.model_name_or_path)
    return parsed

"""The settings of a run: fields of several dataclasses, from one flat YAML file and the command line."""

import argparse
import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_topkast import TopKastConfig, TopKastDistillationConfig


@dataclass
class ModelArguments:
    """Which model, made how."""

    model_type: str = field(default="gpt2", metadata={"help": "Architecture of a new model, such as gpt2 or llama."})
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of the new model's configuration: a mapping in YAML, JSON on the command line."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this model of the hub or a directory instead of a new one."}
    )
    sparse: bool = field(default=True, metadata={"help": "Train with Top-KAST; false is the dense baseline."})

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = read_mapping("config_overrides", self.config_overrides)
        if not isinstance(self.config_overrides, dict | None):
            raise ValueError(f"`config_overrides` is {self.config_overrides!r}: give a mapping, such as `n_layer: 4`.")
        if self.config_overrides and self.model_name_or_path:
            raise ValueError("`config_overrides` is for new models: leave it out, or leave out `model_name_or_path`.")
        refuse_missing_directory("model_name_or_path", self.model_name_or_path)


@dataclass
class DataArguments:
    """Which text, how much of it, and how it is cut up."""

    dataset: Literal["enwik8", "wikitext103", "stdlib", "text"] = field(
        default="stdlib", metadata={"help": "stdlib is Python's own source, which every machine has."}
    )
    data_file: str | None = field(default=None, metadata={"help": "Local file, or zip of it, for enwik8 and text."})
    data_dir: str | None = field(default=None, metadata={"help": "Local folder of wiki.train.raw and so on."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub id or directory. Default: the 256 bytes (not for wikitext103)."}
    )
    window: int = field(default=256, metadata={"help": "Tokens in a window, in training and evaluation."})
    max_train_bytes: int | None = field(default=None, metadata={"help": "Train on the first so many bytes only."})
    max_eval_bytes: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many bytes of valid and of test only."}
    )
    cache_dir: str = field(default="~/.cache/hf_topkast", metadata={"help": "Folder for the tokenized text."})

    def __post_init__(self):
        if self.dataset == "wikitext103" and self.tokenizer is None:
            raise ValueError("`dataset: wikitext103` is counted in words and needs `tokenizer`, for example `gpt2`.")
        if self.dataset == "enwik8" and self.tokenizer is not None:
            raise ValueError("`dataset: enwik8` is counted in bytes: leave `tokenizer` out, or use `dataset: text`.")
        for name in ("max_train_bytes", "max_eval_bytes"):
            check_number(name, getattr(self, name), 1, "leave it out for all")
        refuse_missing_directory("tokenizer", self.tokenizer)


@dataclass
class RunArguments:
    """What the script does around training."""

    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in `output_dir`."})
    sample_tokens: int = field(default=256, metadata={"help": "Tokens of sample text at the end; 0 for none."})
    sample_prompt_tokens: int = field(default=64, metadata={"help": "Tokens of the valid split as its prompt."})

    def __post_init__(self):
        check_number("sample_tokens", self.sample_tokens, 0, "0 is for no sample")
        check_number("sample_prompt_tokens", self.sample_prompt_tokens, 1, "a model goes on from some token")


@dataclass
class FineTuningArguments:
    """What a pretrained model may be given on its way to a sparse one."""

    calibration_windows: int = field(
        default=0,
        metadata={
            "help": "Windows of the training split (run_sft.py: rows) that choose the first sets, by score=activation."
        },
    )
    correct: bool = field(
        default=False, metadata={"help": "Change the weights that stay to make up for those that go (SparseGPT)."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Dense model to learn from: self, the model as it is loaded, or a name."}
    )
    task_weight: float | None = field(
        default=None, metadata={"help": "With a teacher: of the task's loss. Default: 1."}
    )
    logit_weight: float | None = field(default=None, metadata={"help": "With a teacher: of its logits. Default: 1."})
    hidden_weight: float | None = field(
        default=None, metadata={"help": "With a teacher: of its blocks' outputs. Default: 1."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "With a teacher: of both models' logits. Default: 1."}
    )

    def __post_init__(self):
        check_number("calibration_windows", self.calibration_windows, 0, "0 is for none")
        if self.correct and not self.calibration_windows:
            raise ValueError(
                "`correct` is true, but `calibration_windows` is 0: weights are corrected for the inputs that these "
                "bring about. Give some, such as 128, or leave `correct` out."
            )
        for name, value in self.weights().items():
            if self.teacher is None:
                raise ValueError(
                    f"`{name}` is {value}, but there is no `teacher` to learn from. Set `teacher: self`, or leave "
                    f"`{name}` out."
                )
        if self.teacher is not None:
            self.distillation()
            refuse_missing_directory("teacher", self.teacher)

    def weights(self) -> dict[str, float]:
        """The fields of [`TopKastDistillationConfig`] that were given."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(TopKastDistillationConfig)}
        return {name: value for name, value in values.items() if value is not None}

    def distillation(self) -> TopKastDistillationConfig:
        """The weights of the parts of the loss; a `ValueError` if they do not go together."""
        return TopKastDistillationConfig(**self.weights())

    def given(self) -> dict[str, Any]:
        """The fields that ask for something."""
        return {spec.name: value for spec in fields(self) if (value := getattr(self, spec.name)) != spec.default}


# Those of run_clm.py, and so of every run of a sweep.
DATACLASSES = (ModelArguments, DataArguments, RunArguments, TopKastConfig, TrainingArguments, FineTuningArguments)


def parse_arguments(argv: list[str], dataclasses: tuple[type, ...] = DATACLASSES) -> tuple:
    """
    Reads `CONFIG.yaml [--field value ...]`. The command line wins over the file, the file over the defaults.

    A field that two dataclasses share, such as a seed, is one setting and goes to both.

    Args:
        argv (`list[str]`): The command line without the program's name.
        dataclasses (`tuple[type, ...]`, *optional*): Those whose fields there are. Defaults to `DATACLASSES`.

    Returns:
        `tuple`: An object of each.

    Raises:
        `ValueError`: If there is a key that is not a field; the message lists the fields spelt most like it. If a
            value cannot be, or goes against what recipes do.
    """
    # "resolve" lets a second dataclass have a field of the same name: see above.
    usage = "CONFIG.yaml [--field value ...]"  # argparse would name all fields with every error
    parser = HfArgumentParser(
        dataclasses, usage=usage, allow_abbrev=False, conflict_handler="resolve", description=__doc__
    )
    parser.add_argument("config", help="YAML file of fields.")
    fields = {action.dest for action in parser._actions} - {"help", "config"}
    given, unknown = parser.parse_known_args(argv)
    settings = read_yaml(given.config)
    options = [argument.split("=")[0] for argument in unknown if argument.startswith("--")]
    refuse_unknown_keys([*settings, *(option[2:].replace("-", "_") for option in options)], fields, given.config)
    numbers = {name for each in dataclasses for name, kind in get_type_hints(each).items() if kind in (int, float)}
    for action in parser._actions:
        if action.dest in settings:
            check_setting(action, settings[action.dest], given.config, needed=action.dest in numbers)
    parser.set_defaults(**settings)
    parsed = vars(parser.parse_args(argv))
    del parsed["config"]
    found = parser.parse_dict(parsed)
    for each in found:
        if isinstance(each, TrainingArguments):
            settle_training(each)
    return found


def settle_training(args: TrainingArguments) -> None:
    """What recipes want of Trainer's own settings; a `ValueError` if the user's go against it."""
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "`restore_callback_states_from_checkpoint` would put other callbacks in the place of those that measure. "
            "Leave it out: they go on from the checkpoint without it."
        )
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # has no use there, and every loader would warn of it


def read_yaml(path: str) -> dict[str, Any]:
    """
    A flat YAML file of settings.

    Raises:
        `ValueError`: If it does not exist or is not a mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no configuration file `{path}`. Give one of recipes/*/*.yaml as first argument.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not YAML in UTF-8 ({error}).") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"`{path}` is not a list of `field: value` lines.")
    return settings


def read_mapping(name: str, text: str) -> dict[str, Any] | None:
    """A field's mapping or null, as on a command line; a `ValueError` that names the field if it is neither."""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = text
    if not (mapping is None or isinstance(mapping, dict)):
        raise ValueError(f"`{name}` is {text!r}: on the command line give JSON, such as '{{\"n_layer\": 4}}'.")
    return mapping


def check_number(name: str, value: int | None, least: int, why: str) -> None:
    """Raises a `ValueError` that says why if a field's value, where there is one, is less than it may be."""
    if value is not None and value < least:
        raise ValueError(f"`{name}` is {value}: give a number from {least} on ({why}).")


def check_setting(action: argparse.Action, value: Any, path: str, needed: bool) -> None:
    """
    Whether a value of a YAML file is one that an option can have: argparse checks only texts, as a command line has.
    What is `needed` cannot be null.

    Raises:
        `ValueError`: If it is none; the message names the field and says what is allowed.
    """
    if value is None and needed:
        raise ValueError(f"`{action.dest}` is null in `{path}`: give a number, or leave it out for {action.default}.")
    for each in value if isinstance(value, list) else [value]:
        if action.choices is not None and each is not None and each not in action.choices:
            hint = (
                ' YAML takes no and off without quotes for false: write "no".'
                if each is False and "no" in action.choices
                else ""
            )
            raise ValueError(
                f"`{action.dest}` is {each!r} in `{path}`: it must be one of {list(action.choices)}.{hint}"
            )
        if action.type is int and isinstance(each, bool | float):
            raise ValueError(f"`{action.dest}` is {each!r} in `{path}`: it must be a whole number.")


def refuse_missing_directory(name: str, value: str | None) -> None:
    """Raises a `ValueError` if a field's value can be no name on the hub and is no directory."""
    if value and (value.startswith(("/", ".", "~")) or value.count("/") > 1) and not Path(value).is_dir():
        raise ValueError(f"`{name}` is `{value}`, and there is no such directory. Names on the hub are `owner/name`.")


def refuse_unknown_keys(keys: list[str], fields: set[str], path: str) -> None:
    """Raises a `ValueError` that suggests near matches if one of the keys is not a field."""
    problems = []
    for key in keys:
        if key not in fields:
            near = difflib.get_close_matches(key, sorted(fields), n=3)
            problems.append(f"`{key}`" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    if problems:
        raise ValueError(
            f"Not a field, in `{path}` or on the command line: {', '.join(problems)}. `--help`, or `hf-topkast "
            "train --fields`, lists all fields."
        )

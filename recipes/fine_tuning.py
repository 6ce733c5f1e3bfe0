"""What fine-tuning adds to a run: first sets that know the data, a teacher, and what the model was worth before."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import FineTuningArguments
from metrics import token_nats
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from hf_topkast import TopKastConfig, sparsity_report


STAGES_NAME = "before.json"
PROMPT_TOKENS = 64  # that `generate` is timed with, and as many new ones


def settle_fine_tuning(
    tuning: FineTuningArguments, topkast_config: TopKastConfig, sparse: bool, model_name_or_path: str | None
) -> None:
    """
    Whether the settings go together; those of Top-KAST get the score that a calibration stands for.

    Raises:
        `ValueError`: If one would have no effect; the message names it and the way out.
    """
    for name, value in tuning.given().items():
        if not sparse:
            raise ValueError(
                f"`{name}` is {value!r}, but `sparse` is false: the dense baseline is trained by its task alone. "
                f"Leave `{name}` out, or set `sparse: true`."
            )
    if tuning.teacher == "self" and not model_name_or_path:
        raise ValueError(
            "`teacher: self` is the model as it is loaded, and a new model has nothing to teach. Give "
            "`model_name_or_path`, or `teacher` the name of a trained model."
        )
    if not tuning.calibration_windows:
        if sparse and topkast_config.score == "activation":
            raise ValueError(
                "`score: activation` ranks weights by their inputs, and `calibration_windows` is 0. Give some, such "
                "as 128, or leave `score` out."
            )
        return
    if topkast_config.density == "nonzero":
        raise ValueError(
            f"`calibration_windows` is {tuning.calibration_windows}, but with `density: nonzero` zeros say what goes. "
            "Leave it out, or give `density` a number."
        )
    if tuning.correct and topkast_config.initial_density == 1:
        raise ValueError(
            "`correct` makes up for weights that go at the first step, and with `initial_density: 1` none do. Leave "
            "`correct` out, or `initial_density`."
        )
    try:
        topkast_config.score = "activation"
    except ValueError as error:
        raise ValueError(
            f"`calibration_windows` is {tuning.calibration_windows}, and stands for `score: activation`: {error}"
        ) from error


def load_dense(name_or_path: str) -> PreTrainedModel:
    """
    A pretrained model in float32. Many are stored in bfloat16, in which small changes of the optimizer would be lost.

    Raises:
        `ValueError`: If it is sparse.
    """
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    if sparsity_report(model).rows:
        raise ValueError(
            f"`{name_or_path}` is sparse already. `--resume` goes on with the run that made it; or save a copy made "
            "dense with `hf_topkast.densify` and start from that."
        )
    return model


def calibration_arguments(
    tuning: FineTuningArguments, windows: Sequence[Any], tokens_of: Callable[[Any], Tensor], resumed: bool
) -> dict[str, Any]:
    """
    What `sparsify` is given for a calibration; nothing without one.

    Args:
        tuning ([`FineTuningArguments`]): How many windows, and whether weights are corrected.
        windows (`Sequence`): What is trained on; those that count are spread over it evenly.
        tokens_of (`Callable`): The token ids of one of them, (tokens,).
        resumed (`bool`): Whether the weights come from a checkpoint, and so need no correction.

    Raises:
        `ValueError`: If there are fewer windows.
    """
    count = tuning.calibration_windows
    if not count:
        return {}
    if count > len(windows):
        raise ValueError(
            f"`calibration_windows` is {count:,}, but there are {len(windows):,} to train on. Use fewer, or more data."
        )
    chosen = [windows[index * len(windows) // count] for index in range(count)]
    return {"calibration": [tokens_of(window)[None] for window in chosen], "correct": tuning.correct and not resumed}


def teacher_arguments(tuning: FineTuningArguments, model_name_or_path: str | None) -> dict[str, Any]:
    """
    What a distilling trainer is given beside the rest; nothing without a teacher.

    `self` is loaded anew, in bfloat16: a copy of the model that is cast would have rounded rotary frequencies.
    """
    if tuning.teacher is None:
        return {}
    teacher = tuning.teacher
    if teacher == "self":
        teacher = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=torch.bfloat16)
    return {"teacher": teacher, "distillation": tuning.distillation()}


def autocast(args: TrainingArguments) -> contextlib.AbstractContextManager:
    """The precision that Trainer computes in, for a model that no trainer has yet."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Dataset,
    compute_metrics: Callable[[EvalPrediction, bool], dict[str, float]],
    args: TrainingArguments,
) -> dict[str, float]:
    """
    What Trainer would find, for a model that no trainer has yet. Each process does all of it, so none waits.

    Args:
        model ([`~transformers.PreTrainedModel`]): On the device that it is to run on.
        windows (`torch.utils.data.Dataset`): Windows with `input_ids` and `labels`.
        compute_metrics (`Callable`): As [`make_compute_metrics`] makes it.
        args ([`~transformers.TrainingArguments`]): Size of a batch, and precision.
    """
    model.eval()
    loader = DataLoader(windows, args.per_device_eval_batch_size, collate_fn=default_data_collator)
    result: dict[str, float] = {}
    for number, batch in enumerate(loader, start=1):
        labels = batch["labels"].to(model.device)
        with autocast(args):
            logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
        result = compute_metrics(EvalPrediction(token_nats(logits, labels), labels), number == len(loader))
    return result


def tokens_per_second(model: PreTrainedModel, prompt: Tensor, args: TrainingArguments) -> float:
    """
    New tokens a second of greedy `generate` at batch 1: a plain timing of one call after one to warm up, on a machine
    that may have other things to do. benchmarks/generate.py compares carefully.

    Args:
        model ([`~transformers.PreTrainedModel`]): Dense or sparse.
        prompt (`torch.Tensor`): Token ids, (tokens,). As many new ones are made.
        args ([`~transformers.TrainingArguments`]): Precision.
    """
    model.eval()
    prompt = prompt[None].to(model.device)
    length = {"min_new_tokens": prompt.shape[1], "max_new_tokens": prompt.shape[1]}
    for _ in range(2):
        _wait(model.device)
        started = time.perf_counter()
        with autocast(args):
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=0,
                **length,
            )
        _wait(model.device)
        seconds = time.perf_counter() - started
    return prompt.shape[1] / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_file_bytes(folder: str | os.PathLike) -> int:
    """Bytes of the weights in a directory that `save_pretrained` wrote, what stands beside the dense α included."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


class Stages:
    """
    What a pretrained model was worth before its training: `before`, dense, and `at_cut`, right after `sparsify`.

    They are written down, so that a run that was resumed has the numbers of its first start.

    Args:
        folder (`str`): Where `before.json` is, or will be.
        resumed (`bool`): Whether to read it.

    Attributes:
        values (`dict[str, Any]`): What was measured, by its name with that of the stage at the end.
    """

    def __init__(self, folder: str | os.PathLike, resumed: bool):
        self.path = Path(folder, STAGES_NAME)
        self._known = resumed and self.path.is_file()
        self.values: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self._known else {}

    def note(self, stage: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Takes what `measure` finds, unless it is known from the first start."""
        if not self._known:
            self.values |= {f"{name}_{stage}": value for name, value in measure().items()}

    def write(self) -> None:
        """Writes it down, whole or not at all; for one process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

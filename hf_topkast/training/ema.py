"""A moving average of the weights as a callback of `transformers.Trainer`, with its place in checkpoints."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from ..checkpoints import CheckpointError, flush, flush_tree, load_checkpoint
from ..checkpoints.state_file import digest
from ..checks import check, number, whole
from ..surgery import sparse_layers
from .averaged_model import TopKastAveragedModel


logger = logging.get_logger(__name__)

FOLDER = "ema"  # in a checkpoint: the averaged model as save_pretrained writes it, and the record
RECORD_NAME = "topkast_ema.json"


class TopKastEMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the weights during `Trainer.train()`, of sparse and dense models.

    After an optimizer step, and after the refresh that may belong to it: average ← decay·average + (1 − decay)·θ. The
    first update takes the weights as they are. Each checkpoint gets a folder `ema/`, written by `save_pretrained`,
    from which a resumed training goes on bit by bit. Every process keeps the average, the main one writes it.

    Args:
        decay (`float`, *optional*, defaults to 0.999): from 0 to 1.
        update_every (`int`, *optional*, defaults to 1): optimizer steps between two updates.
        device (`str` or `torch.device`, *optional*): where the average is kept; that of the model by default.
        resume (`bool` or `str`, *optional*, defaults to `True`): where a resumed training finds the average: `True` in
            the checkpoint of its step in `output_dir`, a path in that checkpoint. `False` begins a new average.

    Attributes:
        averaged ([`TopKastAveragedModel`], *optional*): the average of the running or last training.

    Raises:
        ValueError: if `decay` or `update_every` is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every: int = 1,
        device: str | torch.device | None = None,
        resume: bool | str | os.PathLike[str] = True,
    ):
        check(0 <= number(decay) <= 1, "decay", decay, "a number from 0 to 1")
        check(whole(update_every) >= 1, "update_every", update_every, "a whole number from 1 on")
        self.decay, self.update_every, self.device, self.resume = decay, int(update_every), device, resume
        self.averaged: TopKastAveragedModel | None = None

    @property
    def model(self) -> nn.Module | None:
        """The averaged model, to evaluate and save; `None` before the first training."""
        return self.averaged and self.averaged.module

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begins the average, or goes on with that of the checkpoint that training resumes from."""
        if args.save_strategy != SaveStrategy.NO and not _saves_whole(model):
            raise ValueError(
                f"TopKastEMACallback cannot save the average of a {type(model).__name__}, whose save_pretrained does "
                "not write the whole model (or which has none). Set save_strategy='no', or use TopKastAveragedModel "
                "in a callback of your own."
            )
        averages = get_ema_multi_avg_fn(self.decay)
        self.averaged = TopKastAveragedModel(model, device=self.device, multi_avg_fn=averages)
        self.model.eval()
        if state.global_step > 0 and self.resume is not False:
            own = self.resume is True
            self._load(_checkpoint(args, state) if own else Path(self.resume), model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the weights after the step into the average."""
        if state.global_step % self.update_every == 0:
            self.averaged.update_parameters(model)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the average into the checkpoint that was just written: whole, or not at all."""
        checkpoint = _checkpoint(args, state)
        if not args.should_save:
            return
        if not checkpoint.is_dir():
            logger.warning(f"There is no {checkpoint}, so the average is not saved at step {state.global_step}.")
            return
        folder, temporary = checkpoint / FOLDER, checkpoint / f"{FOLDER}.tmp"
        for former in (folder, temporary):
            shutil.rmtree(former, ignore_errors=True)
        self.model.save_pretrained(temporary)
        record = {
            "n_averaged": int(self.averaged.n_averaged),
            "average": _digest(self.model),
            "trained": _digest(model),
        }
        (temporary / RECORD_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")
        flush_tree(temporary)
        os.replace(temporary, folder)
        flush(checkpoint)

    def _load(self, checkpoint: Path, trained: nn.Module) -> None:
        folder = checkpoint / FOLDER
        ways = (
            "Give the checkpoint that training resumes from, TopKastEMACallback(resume=path), if it is another one; "
            "resume from one that has its average; or begin a new average with TopKastEMACallback(resume=False)."
        )
        try:
            record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} has no average to go on with ({error}). {ways}") from error
        if record["trained"] != _digest(trained):
            raise CheckpointError(f"{folder} is an average of other weights than training resumes from. {ways}")
        if next(sparse_layers(self.model), None) is not None:
            load_checkpoint(self.model, folder)
        else:
            loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(loaded.state_dict())
        if record["average"] != _digest(self.model):
            raise CheckpointError(f"{folder} is damaged: its weights are not those that were written. {ways}")
        self.averaged.n_averaged.fill_(record["n_averaged"])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _saves_whole(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)


def _digest(model: nn.Module) -> str:
    return digest({name: parameter.detach() for name, parameter in model.named_parameters()})

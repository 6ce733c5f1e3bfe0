"""What a checkpoint of Trainer tells of the training that it continues."""

import json
import os
import pickle
from dataclasses import fields
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..checkpoints import CheckpointError, SparseState
from ..config import TopKastConfig
from .callback import saved_schedule


logger = logging.get_logger(__name__)


def resumable_step(directory: str | os.PathLike[str]) -> int:
    """
    The optimizer step at which a checkpoint's training stopped.

    Raises:
        CheckpointError: if the directory, the optimizer's state or Trainer's is missing, or Trainer's is damaged.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"There is no checkpoint directory '{directory}'.")
    for name in (OPTIMIZER_NAME, TRAINER_STATE_NAME):
        if not os.path.isfile(os.path.join(directory, name)):
            raise CheckpointError(
                f"{directory} has no {name}, so training cannot be resumed exactly (save_only_model writes none). "
                "Start a new training from its weights: from_pretrained, and train without resume_from_checkpoint."
            )
    path = os.path.join(directory, TRAINER_STATE_NAME)
    with open(path, encoding="utf-8") as file:
        try:
            state = json.load(file)
        except ValueError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}). Use another checkpoint.") from error
    return saved_schedule(state.get("stateful_callbacks") or {}, state["global_step"])["step"]


def read_ahead(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The sets that a checkpoint's training had chosen ahead.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        return torch.load(path, weights_only=True)
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Use another checkpoint.") from error


def warn_of_other_settings(config: TopKastConfig, state: SparseState) -> None:
    """Says which settings differ from those that the checkpoint was trained with, one warning for each."""
    for name in (spec.name for spec in fields(config)):
        now, then = getattr(config, name), getattr(state.config, name)
        if now != then:
            logger.warning(f"Resuming with {name}={now!r}; the checkpoint was trained with {name}={then!r}.")

"""What `save_pretrained` writes of a sparse model: α under the stock names, and our state file beside it."""

import functools
import inspect
import json
import os
import threading
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..surgery import sparse_info, sparse_layers
from .checkpoint import split_state_dict
from .compact import compact_state
from .durable import replacing
from .state_file import STATE_NAME, SparseState, write_state


# The settings, for people to read; what counts is the state file.
SETTINGS_NAME = "topkast_config.json"
OUR_FILES = (STATE_NAME, SETTINGS_NAME)

# Several threads may save into one directory: each writes all of its files before the next one writes any.
_one_at_a_time = threading.RLock()


def export_sparse(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """
    Writes a sparse model in its compact form, for `from_pretrained` with our import: about density · 4 + 1/8 bytes
    for each weight of a sparse layer in fp32, and everything else as ever.

    It holds α and A only. A model loaded from it computes the same, bit for bit, and has B = A until a training's
    first refresh. Training cannot be resumed from it. Readers without our import stop with an error.

    Args:
        model (`PreTrainedModel`): a sparse model.
        save_directory (`str` or `os.PathLike`): the directory to write.
        kwargs: arguments of `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: if the model has no sparse layer.
    """
    sparse_info(model)
    stock, state = split_state_dict(model)
    compact = compact_state(model, stock, state)
    _write(model, save_directory, stock, compact, **kwargs)


def _write(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    stock: dict[str, Tensor],
    state: SparseState,
    **kwargs: Any,
) -> None:
    with _one_at_a_time:
        _stock_save_pretrained(model, directory, state_dict=stock, **kwargs)
        if kwargs.get("is_main_process", True):
            write_state(state, directory)
            with replacing(Path(directory) / SETTINGS_NAME) as path:
                path.write_text(json.dumps(state.config.to_dict(), indent=2) + "\n", encoding="utf-8")


_stock_save_pretrained = PreTrainedModel.save_pretrained
_PUSH_ARGUMENTS = inspect.signature(PreTrainedModel.push_to_hub).parameters.keys()


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """As ever for a dense model; of a sparse one, α goes out under the stock names, with the state beside it."""
    given = {"is_main_process": is_main_process, **kwargs}
    adapters_only = getattr(self, "_hf_peft_config_loaded", False)
    if adapters_only or next(sparse_layers(self), None) is None:
        with _one_at_a_time:
            _stock_save_pretrained(self, save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **given)
            if is_main_process and not (adapters_only or kwargs.get("variant") or os.path.isfile(save_directory)):
                for name in OUR_FILES:  # of weights that have just been written over
                    Path(save_directory, name).unlink(missing_ok=True)
        return
    stock, state = split_state_dict(self, state_dict)
    _write(self, save_directory, stock, state, **given)
    if push_to_hub and is_main_process:  # by a way that uploads the state file too
        repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
        self.push_to_hub(repo_id, **{key: value for key, value in kwargs.items() if key in _PUSH_ARGUMENTS})


PreTrainedModel.save_pretrained = _save_pretrained

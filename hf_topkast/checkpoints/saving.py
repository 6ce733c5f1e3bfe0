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
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

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
        kwargs: arguments of `save_pretrained`, such as `max_shard_size`, but not `push_to_hub`.

    Raises:
        TypeError: if `model` is no transformers model, such as one inside a wrapper of PEFT.
        ValueError: if the model has no sparse layer, or has adapters, or if it is to be pushed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_sparse takes a transformers model, which from_pretrained can load, not a {type(model).__name__}. "
            "Adapters of PEFT are saved by themselves: peft_model.save_pretrained; export the model they are for."
        )
    sparse_info(model)
    if getattr(model, "peft_config", None):
        raise ValueError("The model has adapters, which an export has no place for: export it before they are added.")
    if kwargs.pop("push_to_hub", False):
        raise ValueError(
            "export_sparse writes a directory only: leave push_to_hub out, and upload what it wrote by "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=...)."
        )
    stock, state = split_state_dict(model, kwargs.pop("state_dict", None))
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
            _drop_former_weights(Path(directory), kwargs.get("variant"))
            write_state(state, directory)
            with replacing(Path(directory) / SETTINGS_NAME) as path:
                path.write_text(json.dumps(state.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _drop_former_weights(directory: Path, variant: str | None) -> None:
    """
    Of one file and an index of shards, deletes what an earlier save in other pieces has left: readers take the one
    file, whichever is newer. transformers deletes shards of former saves, so any that are here have just been written.
    """
    names = (_add_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    weights, index = (directory / name for name in names)
    if weights.is_file() and index.is_file():
        shards = directory.glob(f"{weights.stem}-?????-of-?????{weights.suffix}")
        (weights if any(shards) else index).unlink()


_stock_save_pretrained = PreTrainedModel.save_pretrained
_SAVE_SIGNATURE = inspect.signature(_stock_save_pretrained)
_PUSH_ARGUMENTS = inspect.signature(PreTrainedModel.push_to_hub).parameters.keys()


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """As ever for a dense model; of a sparse one, α goes out under the stock names, with the state beside it."""
    bound = _SAVE_SIGNATURE.bind(self, *args, **kwargs)
    given = {key: value for key, value in bound.arguments.items() if key not in ("self", "kwargs")}
    given |= bound.arguments.get("kwargs", {})
    save_directory = given.pop("save_directory")
    is_main_process, adapters_only = given.get("is_main_process", True), getattr(self, "_hf_peft_config_loaded", False)
    if adapters_only or next(sparse_layers(self), None) is None:
        with _one_at_a_time:
            _stock_save_pretrained(self, save_directory, **given)
            if is_main_process and not (adapters_only or given.get("variant") or os.path.isfile(save_directory)):
                for name in OUR_FILES:  # of weights that have just been written over
                    Path(save_directory, name).unlink(missing_ok=True)
        return
    if given.pop("distributed_checkpoint", False):
        raise ValueError(
            "distributed_checkpoint=True would write the values of sparse layers without their places in a form that "
            "from_pretrained reads. Leave it out: the whole weights are gathered, and written as ever."
        )
    push_to_hub = given.pop("push_to_hub", False)
    stock, state = split_state_dict(self, given.pop("state_dict", None))
    _write(self, save_directory, stock, state, **given)
    if push_to_hub and is_main_process:  # by a way that uploads the state file too
        repo_id = given.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
        self.push_to_hub(repo_id, **{key: value for key, value in given.items() if key in _PUSH_ARGUMENTS})


PreTrainedModel.save_pretrained = _save_pretrained

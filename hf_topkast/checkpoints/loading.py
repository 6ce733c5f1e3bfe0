"""
How `from_pretrained` rebuilds sparse layers and `save_pretrained` writes them.

`import hf_topkast` makes transformers know the `quant_method` "topkast", which a sparse checkpoint's `config.json`
names. Without that import transformers skips it with a warning and loads the dense α. Our quantizer only rebuilds and
then takes itself off the model: a model with a quantizer refuses `.half()`, plain Trainer training and
`save_pretrained(state_dict=...)`, none of which holds for a sparse one.
"""

import functools
import inspect
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file, logging

from ..config import QUANT_METHOD, TopKastConfig
from ..layers import sparse_type
from ..surgery import (
    SparseInfo,
    make_sparse,
    mark_sparse,
    replace_module,
    sparse_info,
    sparse_layers,
    sparsify,
    weight_rows,
)
from .checkpoint import restore_layer, restore_theta, split_state_dict
from .compact import compact_state, expect_compact, fill_compact
from .state_file import STATE_NAME, CheckpointError, SparseState, read_state, write_state


logger = logging.get_logger(__name__)

register_quantization_config(QUANT_METHOD)(TopKastConfig)


@register_quantizer(QUANT_METHOD)
class TopKastQuantizer(HfQuantizer):
    """Turns the dense α that `from_pretrained` has loaded into sparse layers, with the state file beside it."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        directory = _state_directory(model, checkpoint_files or ()) if self.pre_quantized else None
        self._state = None if directory is None else read_state(directory)
        if self._state is not None:
            self._places = {name: _locate(model, name) for name in self._state.shapes}
            if self._state.compact:
                expect_compact(model, self._places)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        if self._state is None:
            if self.pre_quantized:
                empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
                if empty:  # as compact exports write them; newer transformers notice it themselves
                    raise CheckpointError(
                        f"'{model.name_or_path}' is a compact export without its {STATE_NAME}, which holds the "
                        f"weights: '{empty[0]}' and others are empty, a mismatch with the model. Copy that file "
                        "beside the others."
                    )
                logger.warning(
                    f"'{model.name_or_path}' has no {STATE_NAME}: the weights outside A are lost and start again from "
                    "zero. Fine-tuning works; resuming the training that wrote the checkpoint does not."
                )
            sparsify(model, self.quantization_config)
            return
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if offloaded:
            raise ValueError(
                f"device_map puts '{offloaded[0]}' and {len(offloaded) - 1} other parameters on disk, from where a "
                "sparse model cannot be used. Load it onto devices with room for it, or without device_map."
            )
        if self._state.compact:
            fill_compact(model, self._state, self._places)
        else:
            rebuild(model, self._state, self._places)

    @property
    def is_trainable(self) -> bool:
        """Sparse models are there to be trained."""
        return True

    def is_serializable(self, **kwargs) -> bool:
        """They are saved by `save_pretrained`."""
        return True


def _state_directory(model: PreTrainedModel, weight_files: Iterable[str]) -> str | None:
    """Directory of the state file that lies beside the files of weights, fetched from the hub if need be."""
    folders = [Path(file).parent for file in weight_files]
    for folder in folders:
        if (folder / STATE_NAME).is_file():
            return str(folder)
    if os.path.isdir(model.name_or_path) or not folders:
        return None
    # In the hub's cache: CACHE/models--USER--NAME/snapshots/COMMIT/SUBFOLDER.
    parts = folders[0].parts
    snapshots = len(parts) - 1 - parts[::-1].index("snapshots")
    path = cached_file(
        model.name_or_path,
        STATE_NAME,
        cache_dir=str(Path(*parts[: snapshots - 1])),
        revision=parts[snapshots + 1],
        subfolder="/".join(parts[snapshots + 2 :]),
        _raise_exceptions_for_missing_entries=False,
    )
    return None if path is None else os.path.dirname(path)


def rebuild(model: nn.Module, state: SparseState, places: dict[str, str]):
    """
    Replaces the dense layers of a freshly loaded model by the sparse ones of a checkpoint, in place.

    Args:
        model (`torch.nn.Module`): the dense model with α loaded.
        state ([`SparseState`]): what was saved beside it.
        places (`dict[str, str]`): the name in `model` of each of its layers.

    Raises:
        CheckpointError: if the state is not that of the loaded weights. The model is unchanged then.
    """
    for name, place in places.items():  # all before the first swap, so that an error leaves the model as it was
        restore_theta(weight_rows(model.get_submodule(place)), state, name)
    for name, place in places.items():
        dense = model.get_submodule(place)
        theta = restore_theta(weight_rows(dense), state, name)
        active, backward = (mask.to(theta.device) for mask in state.masks(name))
        layer = make_sparse(dense, active, backward, state.config)
        restore_layer(layer, theta, state, name)
        replace_module(model, dense, layer)
    mark_sparse(model, SparseInfo(state.config, state.step))


def _locate(model: nn.Module, name: str) -> str:
    """The name in this model of a layer of the saved one, which may have or lack a head around the same base model."""
    prefix = getattr(model, "base_model_prefix", "")
    modules = dict(model.named_modules())
    for place in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if place in modules and sparse_type(modules[place]) is not None:
            return place
    found = modules.get(name)
    raise CheckpointError(
        f"{STATE_NAME} belongs to another model: it has a sparse layer '{name}', and the model has "
        f"{'none of that name' if found is None else 'a ' + type(found).__name__ + ' there'}."
    )


def export_sparse(model: PreTrainedModel, save_directory: str | os.PathLike, **kwargs):
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
    stock, state = split_state_dict(model, model.state_dict())
    compact = compact_state(model, stock, state)
    _write(model, save_directory, stock, compact, **kwargs)


def _write(model: PreTrainedModel, directory, stock: dict[str, Tensor], state: SparseState, **kwargs):
    model.config.quantization_config = state.config.to_dict()
    try:
        _stock_save_pretrained(model, directory, state_dict=stock, **kwargs)
    finally:
        del model.config.quantization_config
    if kwargs.get("is_main_process", True):
        write_state(state, directory)


_stock_save_pretrained = PreTrainedModel.save_pretrained
_PUSH_ARGUMENTS = inspect.signature(PreTrainedModel.push_to_hub).parameters.keys()


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
    """As ever for a dense model; of a sparse one, α goes out under the stock names, with the state beside it."""
    given = {"is_main_process": is_main_process, **kwargs}
    adapters_only = getattr(self, "_hf_peft_config_loaded", False)
    if adapters_only or next(sparse_layers(self), None) is None:
        return _stock_save_pretrained(self, save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **given)
    stock, state = split_state_dict(self, self.state_dict() if state_dict is None else state_dict)
    _write(self, save_directory, stock, state, **given)
    if push_to_hub and is_main_process:  # by a way that uploads the state file too
        repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
        self.push_to_hub(repo_id, **{key: value for key, value in kwargs.items() if key in _PUSH_ARGUMENTS})


PreTrainedModel.save_pretrained = _save_pretrained

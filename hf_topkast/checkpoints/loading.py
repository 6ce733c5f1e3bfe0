"""
How `from_pretrained` rebuilds sparse layers.

A checkpoint is sparse if and only if our state file lies beside its weights and fits them; nothing of ours stands in
`config.json`, which other tools keep when they change the weights. `import hf_topkast` lets `from_pretrained` look for
that file. What it then uses of transformers' quantizers is their place in the loading: ours rebuilds, in memory only,
and takes itself off the model, since one with a quantizer refuses `.half()`, plain Trainer training and
`save_pretrained(state_dict=...)`, none of which holds for a sparse one.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from contextvars import ContextVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import CONFIG_NAME, cached_file, is_peft_available, logging

from ..config import QUANT_METHOD, TopKastConfig
from ..layers import layer_named, sparse_type, weight_grid
from ..surgery import SparseInfo, make_sparse, mark_sparse, replace_module, sparsify
from .checkpoint import restore_layer, restore_theta
from .compact import expect_compact, fill_compact
from .state_file import STATE_NAME, CheckpointError, SparseState, read_state


logger = logging.get_logger(__name__)

# Where the running `from_pretrained` has found a state file; `None` where there is none.
_directory: ContextVar[str | None] = ContextVar("topkast_directory", default=None)
# The arguments of `from_pretrained` that say which file of a repository.
ADAPTER_CONFIG = "adapter_config.json"
PLACES = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")

register_quantization_config(QUANT_METHOD)(TopKastConfig)


@register_quantizer(QUANT_METHOD)
class TopKastQuantizer(HfQuantizer):
    """Turns the dense α that `from_pretrained` has loaded into sparse layers, with the state file beside it."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        directory = _directory.get()
        self._state = None if directory is None else read_state(directory)
        self._misfit: CheckpointError | None = None
        if self._state is None:
            return
        try:
            self._places = {name: _locate(model, name) for name in self._state.shapes}
            if self._state.compact:
                _check_empty(checkpoint_files or ())
                expect_compact(model, self._places)
        except CheckpointError as error:
            self._misfit = error

    def _process_model_after_weight_loading(self, model, **kwargs):
        conversions = getattr(model, "_weight_conversions", None)
        self.remove_quantization_config(model)
        if conversions is not None:
            model._weight_conversions = conversions  # by which save_pretrained gives weights their names on disk
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        if self._state is not None:
            self._rebuild(model)
        elif self.pre_quantized:  # by hf_topkast 0.1.0, which noted itself in config.json
            _check_full(model)
            _warn_dense(model, f"config.json says that it is sparse, but there is no {STATE_NAME}")
        else:
            sparsify(model, self.quantization_config)

    def _rebuild(self, model: PreTrainedModel):
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if offloaded:
            raise ValueError(
                f"device_map puts '{offloaded[0]}' and {len(offloaded) - 1} other parameters on disk, from where a "
                "sparse model cannot be used. Load it onto devices with room for it, or without device_map."
            )
        if self._misfit is None:
            try:
                (fill_compact if self._state.compact else rebuild)(model, self._state, self._places)
            except CheckpointError as error:
                self._misfit = error
        if self._misfit is not None:
            _warn_dense(model, f"{self._misfit} So another tool has changed them (fine-tuned, merged or averaged)")

    @property
    def is_trainable(self) -> bool:
        """Sparse models are there to be trained."""
        return True

    def is_serializable(self, **kwargs) -> bool:
        """They are saved by `save_pretrained`."""
        return True


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
        restore_theta(weight_grid(layer_named(model, place), state.config), state, name)
    for name, place in places.items():
        dense = layer_named(model, place)
        theta = restore_theta(weight_grid(dense, state.config), state, name)
        active, backward = (mask.to(theta.device) for mask in state.masks(name))
        layer = make_sparse(dense, active, backward, state.config)
        restore_layer(layer, theta, state, name)
        replace_module(model, dense, layer)
    mark_sparse(model, SparseInfo(state.config, state.step))


def _locate(model: nn.Module, name: str) -> str:
    """The name in this model of a layer of the saved one, which may have or lack a head around the same base model."""
    prefix = getattr(model, "base_model_prefix", "")
    for place in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        layer = layer_named(model, place)
        if layer is not None and sparse_type(layer) is not None:
            return place
    found = layer_named(model, name)
    raise CheckpointError(
        f"{STATE_NAME} belongs to another model: it has a sparse layer '{name}', and the model has "
        f"{'none of that name' if found is None else 'a ' + type(found).__name__ + ' there'}."
    )


def _check_empty(weight_files: Iterable[str]):
    """Whether weights are left out of a compact export; else somebody has written whole ones over it."""
    for path in weight_files:
        with safe_open(path, framework="pt") as file:
            if any(0 in file.get_slice(key).get_shape() for key in file.keys()):  # noqa: SIM118 (a file, not a dict)
                return
    raise CheckpointError(f"{STATE_NAME} is a compact export's, and the weights beside it are not empty.")


def _check_full(model: PreTrainedModel):
    empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
    if empty:  # as compact exports write them; newer transformers notice it themselves
        raise CheckpointError(
            f"'{model.name_or_path}' is a compact export without its {STATE_NAME}, which holds the weights: "
            f"'{empty[0]}' and others are empty, a mismatch with the model. Copy that file beside the others."
        )


def _warn_dense(model: PreTrainedModel, why: str):
    logger.warning(
        f"'{model.name_or_path}' is loaded as an ordinary dense model: {why}. To train it with the zeros that it has, "
        'call sparsify(model, density="nonzero"); save it anew to be rid of this warning. Resuming the training that '
        "wrote the checkpoint is not possible from it."
    )


def _find_state(name_or_path: str | os.PathLike, places: dict) -> str | None:
    """The directory of a checkpoint's state file, fetched from the hub if need be; `None` if it has none."""
    if os.path.isdir(name_or_path):
        directory = os.path.join(name_or_path, places.get("subfolder") or "")
        return directory if os.path.isfile(os.path.join(directory, STATE_NAME)) else None
    path = _fetch(name_or_path, STATE_NAME, places)
    return None if path is None else os.path.dirname(path)


def _fetch(name_or_path: str | os.PathLike, file: str, places: dict) -> str | None:
    try:
        return cached_file(
            name_or_path,
            file,
            **places,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None  # no such repository, say: transformers is about to find the same, and words it for its own files


def _base_of_adapter(name_or_path: str | os.PathLike, places: dict) -> str | None:
    """The model that PEFT adapters in a directory or repository are for; `None` if there are none."""
    path = _fetch(name_or_path, ADAPTER_CONFIG, places) if is_peft_available() else None
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("base_model_name_or_path")


def _names_us(name_or_path: str | os.PathLike, places: dict, config) -> bool:
    """Whether a configuration has the key by which 0.1.0 told that a checkpoint is sparse."""
    if config is not None and not isinstance(config, str | os.PathLike):
        return getattr(config, "quantization_config", None) is not None
    path = _fetch(name_or_path if config is None else config, CONFIG_NAME, places)
    if path is None:
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("quantization_config") is not None


_stock_from_pretrained = PreTrainedModel.from_pretrained.__func__


@functools.wraps(_stock_from_pretrained)
def _from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
    """As ever for a dense checkpoint; one with our state file, which fits its weights, gives the sparse model back."""
    places = {name: kwargs[name] for name in PLACES if kwargs.get(name) is not None}
    given = kwargs.get("quantization_config")
    directory, base = None, pretrained_model_name_or_path
    if base is not None and kwargs.get("gguf_file") is None:
        directory = _find_state(base, places)
        adapted = None if directory is not None else _base_of_adapter(base, places)
        if adapted is not None:  # transformers goes on to it
            base, places = adapted, {key: places[key] for key in places.keys() - {"subfolder", "revision"}}
            directory = _find_state(base, places)
    if directory is not None and not (given is None or isinstance(given, TopKastConfig)):
        logger.warning(
            f"'{pretrained_model_name_or_path}' is a sparse checkpoint, and {type(given).__name__} quantises its "
            "weights as those of the dense model that computes the same."
        )
        directory = None
    if directory is not None:
        if given is not None:
            logger.warning(
                f"'{pretrained_model_name_or_path}' is sparse already, with settings of its own: those of the given "
                "quantization_config are not used. Set fields of model.topkast.config afterwards."
            )
        # Any configuration of ours: it brings the quantizer about, and the state has its own settings.
        legacy = _names_us(base, places, kwargs.get("config"))
        kwargs["quantization_config"] = None if legacy else TopKastConfig()
    token = _directory.set(directory)
    # Tensors made in inference mode could not be trained; a dense checkpoint's are made in threads outside of it.
    ordinary = contextlib.nullcontext() if kwargs.get("quantization_config") is None else torch.inference_mode(False)
    try:
        with ordinary:
            return _stock_from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)
    finally:
        _directory.reset(token)


PreTrainedModel.from_pretrained = classmethod(_from_pretrained)

"""
How `from_pretrained` rebuilds sparse layers and `save_pretrained` writes them.

`import hf_topkast` makes transformers know the `quant_method` "topkast", which a sparse checkpoint's `config.json`
names. Without that import transformers skips it with a warning and loads the dense α. Our quantizer only rebuilds and
then takes itself off the model: a model with a quantizer refuses `.half()`, plain Trainer training and
`save_pretrained(state_dict=...)`, none of which holds for a sparse one.
"""

import functools
import os

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file, logging

from .checkpoint import (
    STATE_NAME,
    CheckpointError,
    SparseState,
    read_state,
    restore_layer,
    restore_theta,
    split_state_dict,
    write_state,
)
from .config import QUANT_METHOD, TopKastConfig
from .layers import sparse_type
from .surgery import (
    SparseInfo,
    make_sparse,
    mark_sparse,
    replace_module,
    sparse_info,
    sparse_layers,
    sparsify,
    weight_rows,
)


logger = logging.get_logger(__name__)

register_quantization_config(QUANT_METHOD)(TopKastConfig)


@register_quantizer(QUANT_METHOD)
class TopKastQuantizer(HfQuantizer):
    """Turns the dense α that `from_pretrained` has loaded into sparse layers, with the state file beside it."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self._checkpoint_files = checkpoint_files

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        directory = self._state_directory(model)
        if directory is None:
            if self.pre_quantized:
                logger.warning(
                    f"'{model.name_or_path}' has no {STATE_NAME}: the weights outside A are lost and start again from "
                    "zero. Fine-tuning works; resuming the training that wrote the checkpoint does not."
                )
            sparsify(model, self.quantization_config)
        else:
            rebuild(model, read_state(directory))

    def _state_directory(self, model: PreTrainedModel) -> str | None:
        """Directory of the state file that belongs to the loaded weights, fetched from the hub if need be."""
        for file in self._checkpoint_files or ():
            if os.path.isfile(os.path.join(os.path.dirname(file), STATE_NAME)):
                return os.path.dirname(file)
        if os.path.isdir(model.name_or_path):
            return None
        revision = getattr(model.config, "_commit_hash", None)
        path = cached_file(
            model.name_or_path, STATE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else os.path.dirname(path)

    @property
    def is_trainable(self) -> bool:
        """Sparse models are there to be trained."""
        return True

    def is_serializable(self, **kwargs) -> bool:
        """They are saved by `save_pretrained`."""
        return True


def rebuild(model: nn.Module, state: SparseState):
    """
    Replaces the dense layers of a freshly loaded model by the sparse ones of a checkpoint, in place.

    Args:
        model (`torch.nn.Module`): the dense model with α loaded.
        state ([`SparseState`]): what was saved beside it.

    Raises:
        CheckpointError: if the state is not that of the loaded weights. The model is unchanged then.
    """
    places = {name: _locate(model, name) for name in state.shapes}
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


def _save_sparse(save_pretrained):
    """Wraps `PreTrainedModel.save_pretrained`: for a model with sparse layers, α goes out under the stock names."""

    @functools.wraps(save_pretrained)
    def wrapper(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        if next(sparse_layers(self), None) is None:
            return save_pretrained(
                self,
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                **kwargs,
            )
        stock, state = split_state_dict(self, self.state_dict() if state_dict is None else state_dict)
        self.config.quantization_config = sparse_info(self).config.to_dict()
        try:
            save_pretrained(self, save_directory, is_main_process=is_main_process, state_dict=stock, **kwargs)
        finally:
            del self.config.quantization_config
        if is_main_process:
            write_state(state, save_directory)
        if push_to_hub:  # by a way that uploads the state file too
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)

    return wrapper


PreTrainedModel.save_pretrained = _save_sparse(PreTrainedModel.save_pretrained)

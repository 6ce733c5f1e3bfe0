"""What a layer carries beside its weights, which goes over to the layer that replaces it."""

import weakref

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Where nn.Module keeps hooks. The dictionaries themselves move, so that handles of hooks still take them off.
HOOKS = tuple(
    vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
)
# What layers, dense or sparse, say of themselves.
OWN = {
    "in_features",
    "out_features",
    "nx",
    "nf",
    "backend",
    "block_size",
    "row_stride",
    "reservoir",
    "reservoir_device",
    "gradient_watch",
    "input_watch",
    "powerprop_alpha",
    "_handles",
}
OWN |= {"assignments", "sets_digest", "forward"}


def check_carried(name: str, layer: nn.Module):
    """
    Refuses a layer whose replacement would compute something else.

    Raises:
        ValueError: if its weight is computed from other tensors (pruning, weight norm, parametrisations), or if it has
            a `forward` of its own; the message names the layer and the way out.
    """
    if layer._parameters.get("weight") is None:
        if getattr(layer, "parametrizations", None):
            way_out = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        elif hasattr(layer, "weight_mask"):
            way_out = "torch.nn.utils.prune.remove(layer, 'weight')"
        elif hasattr(layer, "weight_g"):
            way_out = "torch.nn.utils.remove_weight_norm(layer)"
        else:
            way_out = "what puts a parameter back in its place"
        raise ValueError(
            f"The weight of layer '{name}' is computed from {sorted(dict(layer.named_parameters()))}, and a sparse "
            f"layer would have a stale copy of it. Call {way_out} first, or name the layer in exclude_modules."
        )
    check_forward(name, layer)


def check_forward(name: str, layer: nn.Module):
    """
    Refuses a layer whose `forward` somebody has replaced. (Accelerate's hooks do, and leave the class's own behind.)

    Raises:
        ValueError: if it is another one than its class's; the message names the layer and the way out.
    """
    forward = vars(layer).get("_old_forward" if "_hf_hook" in vars(layer) else "forward")
    stock = getattr(forward, "__func__", None) is type(layer).forward and forward.__self__ is layer
    if forward is not None and not stock:
        raise ValueError(
            f"Layer '{name}' has a forward of its own ({forward!r}), which its replacement would not have. Delete it "
            "(del layer.forward) and patch the replacement instead, or name the layer in exclude_modules."
        )


def carry_over(old: nn.Module, new: nn.Module):
    """
    Gives a replacement the hooks of the layer it replaces, Accelerate's own, and whatever else was noted on it.

    A hook on the weight itself cannot come along, since its gradient has other elements now: that is said.
    """
    dispatch = vars(old).get("_hf_hook")  # by which a device_map moves inputs
    if dispatch is not None:
        remove_hook_from_module(old)
    for key in HOOKS:
        new.__dict__[key] = old.__dict__[key]
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    noted = {key: value for key, value in vars(old).items() if not key.startswith("_") and key not in OWN}
    new.__dict__.update({key: value for key, value in noted.items() if key not in vars(new)})
    # Or transformers would draw the weights anew where the model becomes part of another.
    new._is_hf_initialized = True
    if dispatch is not None:
        add_hook_to_module(new, dispatch)


def warn_of_lost_hooks(name: str, weight: nn.Parameter):
    """Says that hooks on a weight are not those of its replacement."""
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        logger.warning(
            f"The weight of layer '{name}' has hooks on its gradient, which the sparse layer does not keep: its "
            "values are other elements. Register them on layer.values."
        )

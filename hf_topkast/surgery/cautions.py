"""What a model is refused for, or told, when it becomes sparse."""

import difflib
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import TopKastConfig
from ..method import get_method
from ..storage import is_sharded


logger = logging.get_logger(__name__)

TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_model(model: nn.Module, verb: str):
    """
    Raises:
        TypeError: if it is no module.
        ValueError: if DDP or FSDP2 has wrapped it or a part of it; they would go on with the former parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a model that is loaded, such as one of from_pretrained, not {model!r}.")
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FSDPModule):
            raise ValueError(
                f"{verb} puts other parameters in the place of those that {type(module).__name__} has taken over"
                f"{f' in {name!r}' if name else ''}. Call it before the model is wrapped, or on one loaded anew."
            )


def check_here(name: str, tensors: Iterable[Tensor]):
    """
    Raises:
        ValueError: if a layer has no numbers at the moment.
    """
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"Layer '{name}' is on the meta device and has no weights yet: load or initialise it first. If accelerate "
            "has offloaded it, accelerate.hooks.remove_hook_from_submodules(model) brings its numbers back."
        )


def check_weight(name: str, weight: Tensor):
    """
    Raises:
        ValueError: if the numbers of a layer are not here, or none that can be trained.
    """
    check_here(name, (weight,))
    if is_sharded(weight) or not weight.numel():
        raise ValueError(
            f"The weight of layer '{name}' is {'split over processes' if is_sharded(weight) else 'empty'}: sparsify "
            "the whole model, before anything splits it (FSDP2, tensor parallelism, DeepSpeed)."
        )
    if weight.dtype not in TRAINABLE:
        raise ValueError(
            f"Layer '{name}' has weights of {weight.dtype}, which cannot be trained: load the model in one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in TRAINABLE)}, or name the layer in "
            "exclude_modules."
        )


def check_names(settings: Iterable[str]):
    """
    Raises:
        TypeError: if one of the names is no field of [`TopKastConfig`]; the message lists those spelt most like it.
    """
    known = [spec.name for spec in fields(TopKastConfig) if spec.init]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.5)  # sparsity is near to density
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"sparsify has no setting '{name}'.{meant} help(hf_topkast.TopKastConfig) lists all.")


def check_blocks(name: str, shape: tuple[int, int], block_size: list[int], experts: int | None = None):
    """
    Raises:
        ValueError: if blocks do not fill a layer of this shape, (out, in), or one of its experts of this shape.
    """
    if shape[0] % block_size[0] or shape[1] % block_size[1]:
        sides = f"{shape[0]}×{shape[1]} (out × in)"
        raise ValueError(
            f"Layer '{name}' {f'is {sides}' if experts is None else f'has {experts} experts of {sides}'}, which "
            f"blocks of {block_size[0]}×{block_size[1]} do not fill. Choose a block_size that divides the shape, or "
            "name the layer in exclude_modules."
        )


def check_correction(config: TopKastConfig, calibrated: bool):
    """
    Raises:
        ValueError: if weights are to be corrected without inputs, or where none is taken away.
    """
    if not calibrated:
        raise ValueError("correct=True makes up for weights that go by the inputs of calibration=...: give batches.")
    keeps_all = config.initial_density == 1
    if keeps_all or config.density == "nonzero":
        setting = "initial_density=1" if keeps_all else "density='nonzero'"
        raise ValueError(
            f"correct=True makes up for weights that sparsify takes away, and with {setting} it takes none. Leave one "
            "of the two out."
        )


def check_not_quantized(model: nn.Module):
    """
    Raises:
        ValueError: if a quantizer has loaded the model, GGUF files included.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None)
    if quantizer is not None and not isinstance(settings, TopKastConfig):
        raise ValueError(
            f"{type(model).__name__} was loaded by {type(quantizer).__name__}, so that save_pretrained would refuse "
            "it after training. Make a plain copy: copy.deepcopy(model.config), without its quantization_config, "
            "type(model)(config), load_state_dict of the weights in full precision; and sparsify that."
        )


def warn_of_a_cut(model: nn.Module, config: TopKastConfig):
    """Says of a pretrained model that weights taken away at once by magnitude alone cost it most of what it knows."""
    pretrained = isinstance(model, PreTrainedModel) and getattr(model, "name_or_path", "")
    cut = config.density not in (1, "nonzero") and config.initial_density is None and config.score == "magnitude"
    if pretrained and cut and not get_method(config.method).ranks:
        logger.warning(
            f"'{pretrained}' is a pretrained model, and method={config.method!r} draws the first A at random, which "
            "costs it all that it knows: it is for training from scratch. For fine-tuning see docs/fine_tuning.md."
        )
    elif pretrained and cut:
        logger.warning(
            f"'{pretrained}' is a pretrained model, and density={config.density} takes {1 - config.density:.0%} of "
            "its projections' weights away at once, by magnitude alone, which costs it most of what it knows. Two "
            "ways out: sparsify(..., calibration=batches), a few inputs of it, by which the weights that matter "
            "stay; or a schedule from dense, initial_density=1.0. See docs/fine_tuning.md."
        )

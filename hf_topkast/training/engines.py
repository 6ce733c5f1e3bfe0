"""What spreads a training over processes: the engines that sparse parameters can train under, and DDP's buckets."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..layers import TopKastLayer
from ..storage import is_sharded, world_size


DEEPSPEED = (
    "DeepSpeed keeps the parameters in flat buffers of its own, of sizes fixed at the start, where sparse values and "
    "their optimizer state cannot move. Use FSDP2, which shards the same numbers: accelerate launch --use_fsdp "
    "--fsdp_version 2."
)
FSDP1 = (
    "FSDP 1 flattens parameters together, so that sparse values cannot move by themselves. Use FSDP2: accelerate "
    "launch --use_fsdp --fsdp_version 2, or torch's fully_shard."
)


def check_engine(model: nn.Module, optimizer: Optimizer):
    """
    Refuses engines that take the parameters away from their layers.

    Raises:
        ValueError: if DeepSpeed or FSDP 1 runs the model; the message names FSDP2 as the way out.
    """
    if any(base.__module__.startswith("deepspeed.") for run in (model, optimizer) for base in type(run).__mro__):
        raise ValueError(DEEPSPEED)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(FSDP1)


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper in a model, around it or under another wrapper."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def check_resizing(setting: str, layers: Iterable[TopKastLayer], ddp: DistributedDataParallel | None):
    """
    Whether what wraps the model can follow parameters whose sizes change.

    Args:
        setting (`str`): what changes them, for the message.
        layers (`Iterable[TopKastLayer]`): the sparse layers.
        ddp (`DistributedDataParallel`, *optional*): the wrapper that the controller was given.

    Raises:
        ValueError: if it cannot.
    """
    sharded = any(is_sharded(layer.values) for layer in layers)
    if ddp is None and world_size() > 1 and not sharded:
        raise ValueError(
            f"{setting} changes the sizes of the sparse parameters during training, and the gradient buckets of "
            "DDP have to follow. Give TopKastController the wrapped model (what accelerator.prepare or "
            "DistributedDataParallel returned), or use TopKastTrainer."
        )


def check_lag(lag: int, layers: Iterable[TopKastLayer]):
    """
    Whether a thread can choose sets.

    Raises:
        ValueError: if FSDP2 has sharded the weights.
    """
    if any(is_sharded(layer.values) for layer in layers):
        raise ValueError(
            f"refresh_lag={lag} has a thread choose sets, which cannot gather the weights that FSDP2 has sharded "
            "while training communicates. Set refresh_lag=0, or train under DDP."
        )


def rebuild_buckets(ddp: DistributedDataParallel):
    """
    Gives DDP's gradient buckets the present sizes of the parameters; between two steps, on every rank.

    DDP lays its buckets out once, when it is made, and would silently leave a resized parameter out of the all-reduce.
    Unpickling lays them out anew, and is the one way there that torch documents.
    """
    ddp.__setstate__(ddp.__getstate__())
    for hook, state in ddp._comm_hooks:  # registered with the buckets, which are new
        dist._register_comm_hook(ddp.reducer, state, hook)

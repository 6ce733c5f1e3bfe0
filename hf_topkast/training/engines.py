"""What spreads a training over processes: the engines that sparse parameters can train under, and DDP's buckets."""

from collections.abc import Iterable, Mapping
from math import prod

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
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
    if ddp is not None and not _can_rebuild(ddp):
        raise ValueError(
            f"{setting} changes the sizes of the sparse parameters during training, and DDP can lay its gradient "
            "buckets out anew only in the default process group and without static_graph. Leave both out."
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


class Buckets:
    """
    DDP's gradient buckets, laid out once for the sizes that values had when DDP was made; what has another size since
    would be left out of the all-reduce without a word.

    Args:
        layers (`Mapping[str, TopKastLayer]`): the sparse layers, by name.
        ddp (`DistributedDataParallel`, *optional*): the wrapper that the controller was given.
    """

    def __init__(self, layers: Mapping[str, TopKastLayer], ddp: DistributedDataParallel | None):
        self._layers, self._ddp = layers, ddp
        self._sizes = self._present()
        if ddp is None or not _can_rebuild(ddp):
            return
        if any(layer.assignments for layer in layers.values()):  # the wrapper may be older than the sizes
            self._sizes = {}
        self.fit()

    def fit(self, setting: str = "A checkpoint"):
        """
        Lays them out anew if values have other sizes; between two steps, on every rank.

        Args:
            setting (`str`, *optional*): what has changed the sizes, for the message.

        Raises:
            ValueError: if they cannot be.
        """
        present = self._present()
        if present != self._sizes:
            check_resizing(setting, self._layers.values(), self._ddp)
            if self._ddp is not None:
                rebuild_buckets(self._ddp)
            self._sizes = present

    def expect(self, stored: Mapping[str, int]):
        """
        Before layers get so many blocks in B.

        Raises:
            ValueError: if that changes sizes, and the buckets cannot follow.
        """
        layers = {name: self._layers[name] for name in stored}
        if any(
            blocks * prod(layers[name].block_size) != layers[name].values.numel() for name, blocks in stored.items()
        ):
            check_resizing("A refresh", layers.values(), self._ddp)

    def follow_load(self):
        """After a state was loaded. Without a wrapper that is known, one is to be made yet."""
        if self._ddp is None:
            self._sizes = self._present()
        else:
            self.fit()

    def check(self):
        """
        Whether the gradients of a step were reduced over all ranks, in the sizes that values have.

        Raises:
            ValueError: if they were not.
        """
        if self._ddp is None:
            return
        if self._ddp._join_config.enable:
            raise ValueError(
                "DDP's join() lets ranks take different numbers of steps, and they would choose sets at different "
                "times and wait for each other. Leave it out and give every rank as many batches, with "
                "drop_last=True, for example."
            )
        if self._present() != self._sizes:
            name = next(name for name, size in self._present().items() if size != self._sizes.get(name))
            raise ValueError(
                f"Layer '{name}' and perhaps others have got other sizes (load_state_dict, for example) since DDP "
                "laid out its gradient buckets, so that their gradients are those of one rank. Load the model before "
                "the controller, and call controller.load_state_dict last."
            )

    def _present(self) -> dict[str, int]:
        return {name: layer.values.numel() for name, layer in self._layers.items()}


def rebuild_buckets(ddp: DistributedDataParallel):
    """
    Gives DDP's gradient buckets the present sizes of the parameters; between two steps, on every rank.

    Unpickling lays them out anew, and is the one way there that torch documents.
    """
    registered = ddp._get_ddp_logging_data().get("comm_hook")
    ddp.__setstate__(ddp.__getstate__())
    # Hooks are registered with the buckets, which are new.
    for hook, state in ddp._comm_hooks:
        if isinstance(state, PowerSGDState):  # what it remembers has the sizes of the former buckets
            for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                memory.clear()
        dist._register_comm_hook(ddp.reducer, state, hook)
    for built_in in (dist.BuiltinCommHookType.ALLREDUCE, dist.BuiltinCommHookType.FP16_COMPRESS):
        if registered == str(built_in):
            ddp._register_builtin_comm_hook(built_in)


def _can_rebuild(ddp: DistributedDataParallel) -> bool:
    return ddp.process_group is dist.group.WORLD and not ddp.static_graph

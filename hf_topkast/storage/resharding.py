"""
Parameters that FSDP2 has sharded, in another size: when a density schedule, the end of exploration or a global
threshold change how many weights a layer stores.

FSDP2 fixes sizes when it wraps a model, in an object of its own for each parameter. Torch has no public way to change
them, so that object is made anew in place, by the function that made it; the parameter stays the same object.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def find_handles(root: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """What FSDP2 keeps of each parameter that it has sharded, by the parameter's module and its name there."""
    found = {}
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for handle in (handle for group in groups if group is not None for handle in group.fsdp_params):
                info = handle._module_info
                found[info.module, info.param_name] = handle
    return found


@torch.no_grad()
def reshard(handle: Any, whole: Tensor):
    """
    Gives a sharded parameter another content, of any size. Between two steps, on every rank.

    Args:
        handle: one of [`find_handles`].
        whole (`torch.Tensor`): the new content, the same on all ranks, on their device.
    """
    parameter = handle.sharded_param
    handle.to_sharded()
    whole = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    parameter.grad = None  # of the former size
    handle._init_sharded_param(whole, handle.device, None, handle.mesh_info)
    if handle.post_forward_mesh_info:
        handle._init_sharded_post_forward_param_metadata(whole)
    torch.utils.swap_tensors(parameter, handle.sharded_param)
    handle.sharded_param = parameter
    handle._setattr_on_modules(parameter)
    handle.all_gather_outputs = []  # buffers of the former size
    handle.unsharded_accumulated_grad = None
    if hasattr(handle, "_unsharded_param"):
        del handle._unsharded_param

"""The compact form of a checkpoint: of each sparse layer one bit per weight and the numbers on A, and nothing else."""

from torch import Tensor, nn

from ..block_order import row_stride
from ..layers import ExpertStack, layer_named, sparse_type
from ..storage import from_grid
from ..surgery import SparseInfo, make_sparse, mark_sparse, replace_module, sparse_layers
from .state_file import SparseState


def compact_state(model: nn.Module, stock: dict[str, Tensor], state: SparseState) -> SparseState:
    """
    Moves α from a stock state dict into a state, in place of what only training needs.

    Args:
        model (`torch.nn.Module`): the sparse model.
        stock (`dict[str, torch.Tensor]`): its stock state dict. Each α in it becomes an empty tensor: a reader that
            does not know the compact form then stops at the wrong shape, and does not start from random weights.
        state ([`SparseState`]): as [`split_state_dict`] gives it with `stock`.

    Returns:
        [`SparseState`]: about density · 4 + 1/8 bytes per weight in fp32.
    """
    tensors = {}
    for name, layer in sparse_layers(model):
        key = layer.stock_name(name)
        alpha = stock[key]
        tensors[f"{name}.active"] = state.tensors[f"{name}.active"]
        tensors[f"{name}.values"] = layer.to_grid(alpha)[state.masks(name)[0]]
        # Of experts in three dimensions, which survive being split and transposed on the way to their names on disk.
        stock[key] = alpha.new_empty((len(alpha), 0, 0) if alpha.ndim == 3 else 0)
    return SparseState(tensors, state.config, state.shapes, {}, state.step, compact=True, experts=state.experts)


class EmptyLayer(nn.Module):
    """Stands in for a dense layer while `from_pretrained` reads a compact export, whose weight is empty."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(dense.weight.new_empty(0), requires_grad=dense.weight.requires_grad)
        self.register_parameter("bias", dense.bias)
        self.dense = [dense]  # in a list: no part of this module


def expect_compact(model: nn.Module, places: dict[str, str]):
    """Makes a model on the meta device ready for the empty weights of an export; `places` are names in the model."""
    for place in places.values():
        dense = layer_named(model, place)
        if isinstance(dense, ExpertStack):
            dense.empty()
        else:
            replace_module(model, dense, EmptyLayer(dense))


def fill_compact(model: nn.Module, state: SparseState, places: dict[str, str]):
    """
    Puts the sparse layers of an export in the places that [`expect_compact`] has kept, with B = A. An export has no
    norms of inputs, so that what trains on from it ranks by magnitude.
    """
    state.config.score, state.config.compare = "magnitude", "layer"
    for name, place in places.items():
        empty = layer_named(model, place)
        active = state.masks(name)[0].to(empty.weight.device)
        values = state.tensors[f"{name}.values"].to(empty.weight)
        alpha = empty.weight.new_zeros(active.shape).masked_scatter_(active, values)
        experts = state.experts.get(name, 1)
        stride = row_stride(len(alpha) // experts, state.config.block_size[0], state.config.scatter_blocks)
        alpha = from_grid(alpha, stride, experts)
        if isinstance(empty, ExpertStack):
            empty.fill(alpha)
            replace_module(model, empty, make_sparse(empty, active, active, state.config))
            continue
        dense = empty.dense[0]
        stock = sparse_type(dense).to_stock(alpha)
        dense.weight = nn.Parameter(stock, requires_grad=empty.weight.requires_grad)
        dense.bias = empty.bias
        replace_module(model, empty, make_sparse(dense.train(empty.training), active, active, state.config))
    mark_sparse(model, SparseInfo(state.config))

"""Experts of a dense model as ordinary `nn.Linear`s, one for each matrix: what their 3-D parameters stand for."""

import torch
from torch import nn
from transformers import PreTrainedModel


class UnrolledExperts(nn.Module):
    """
    Computes what the experts module does, expert by expert; `up_3` and `down_3` are the matrices of expert 3.

    With `split` the gate's rows come first in `up_3` where the module has gate and up in turn.
    """

    def __init__(self, stock: nn.Module, split: bool):
        super().__init__()
        self.stock, self.count = [stock], stock.num_experts  # in a list: no part of this module
        self.turn = split and stock.has_gate and not stock.is_concatenated
        for kind, key in (("up", "gate_up_proj" if stock.has_gate else "up_proj"), ("down", "down_proj")):
            stacked = getattr(stock, key).detach()
            matrices = stacked.mT if stock.is_transposed else stacked
            for expert, matrix in enumerate(matrices.clone()):
                if kind == "up" and self.turn:
                    matrix = torch.cat([matrix[::2], matrix[1::2]])
                layer = nn.Linear(*matrix.shape[::-1], bias=False)
                layer.weight = nn.Parameter(matrix.contiguous())
                self.add_module(f"{kind}_{expert}", layer)
            if stock.has_bias:
                setattr(self, f"{kind}_bias", getattr(stock, f"{key}_bias"))

    def forward(self, hidden, index, weights):
        stock, total = self.stock[0], torch.zeros_like(hidden)
        for expert in range(self.count):
            token, place = torch.where(index == expert)
            h = getattr(self, f"up_{expert}")(hidden[token])
            if self.turn:
                h = torch.stack(h.chunk(2, -1), -1).flatten(-2)
            if stock.has_bias:
                h = h + self.up_bias[expert]
            h = stock._apply_gate(h) if stock.has_gate else stock.act_fn(h)
            h = getattr(self, f"down_{expert}")(h)
            if stock.has_bias:
                h = h + self.down_bias[expert]
            total = total.index_add(0, token, (h * weights[token, place, None]).to(total.dtype))
        return total


def unroll(model: PreTrainedModel, split: bool = False) -> dict[str, list[str]]:
    """Puts [`UnrolledExperts`] in the place of all experts; gives their names, by that of the parameter."""
    names = {}
    for name, module in list(model.named_modules()):
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            model.set_submodule(name, UnrolledExperts(module, split))
            up = f"{name}.{'gate_up_proj' if module.has_gate else 'up_proj'}"
            for key, kind in ((up, "up"), (f"{name}.down_proj", "down")):
                names[key] = [f"{name}.{kind}_{expert}" for expert in range(module.num_experts)]
    return names


def rows_of_expert(matrix: torch.Tensor, expert: int, experts: int, turn: bool = False) -> torch.Tensor:
    """The rows of one expert of (experts · out, in), the gate's first if gate and up lie in turn."""
    rows = matrix.chunk(experts)[expert]
    return torch.cat([rows[::2], rows[1::2]]) if turn else rows

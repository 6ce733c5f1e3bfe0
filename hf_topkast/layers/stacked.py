"""Matrices of one size in one 3-D parameter, and what stands in for it in code that multiplies by it."""

import operator
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional


class StackedMatrices:
    """
    How the matrices of several experts lie in one parameter, (experts, out, in) or, if it `stores_transposed`,
    (experts, in, out); as rows they lie one below the other, (experts · out, in).

    Attributes:
        experts (`int`): how many there are.
        in_features, out_features (`int`): of one expert.
        stores_transposed (`bool`): how each is stored.
    """

    experts: int
    in_features: int
    out_features: int
    stores_transposed: bool

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(experts · out, in)."""
        return self.experts * self.out_features, self.in_features

    @property
    def stock_shape(self) -> tuple[int, int, int]:
        """Shape of the parameter."""
        sides = (self.out_features, self.in_features)
        return self.experts, *(sides[::-1] if self.stores_transposed else sides)

    def to_rows(self, stock: Tensor) -> Tensor:
        """The parameter as (experts · out, in)."""
        return (stock.mT if self.stores_transposed else stock).reshape(-1, self.in_features)

    def to_stock(self, rows: Tensor) -> Tensor:
        """(experts · out, in) as the parameter."""
        stock = rows.view(self.experts, self.out_features, self.in_features)
        return stock.mT.contiguous() if self.stores_transposed else stock


class GroupedProduct(StackedMatrices):
    """
    A module in the place of a 3-D parameter. It is called with rows sorted by expert; in code that was written for the
    parameter it may be indexed by an expert and multiplied by, with `torch.nn.functional.linear`, `@` or `torch.bmm`.
    Everything else raises.
    """

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        return torch.Size(self.stock_shape)

    def __getitem__(self, expert: int | Tensor) -> "OneExpert":
        """The matrix of one expert, to multiply by."""
        try:
            number = operator.index(expert)
        except TypeError:
            refuse(self, "indexing by several experts")
        if not -self.experts <= number < self.experts:
            raise IndexError(f"There is no expert {number} in {self!r}.")
        return OneExpert(self, number % self.experts)

    def transpose(self, first: int, second: int) -> "Transposed":
        """The parameter with its matrices transposed, to multiply by."""
        if {first % 3, second % 3} != {1, 2}:
            refuse(self, "transpose")
        return Transposed(self)

    def all_rows(self, x: Tensor) -> Tensor:
        """As many rows for each expert: (experts, rows, in) → (experts, rows, out)."""
        count = x.shape[1]
        ends = torch.arange(1, self.experts + 1, dtype=torch.int32, device=x.device) * count
        return self(x.reshape(self.experts * count, x.shape[2]), ends).view(self.experts, count, -1)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Tensor:
        layer = _operand(args, kwargs, GroupedProduct)
        if func is torch.bmm and _second(args) is layer and layer.stores_transposed:
            return layer.all_rows(args[0])
        refuse(layer, func.__name__)


class Transposed:
    """`weight.transpose(1, 2)` of the layer in the place of a parameter."""

    def __init__(self, layer: GroupedProduct):
        self.layer = layer

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Tensor:
        weight = _operand(args, kwargs, Transposed)
        if func is torch.bmm and _second(args) is weight and not weight.layer.stores_transposed:
            return weight.layer.all_rows(args[0])
        refuse(weight.layer, func.__name__)


class OneExpert:
    """`weight[expert]` of the layer in the place of a parameter."""

    def __init__(self, layer: GroupedProduct, expert: int):
        self.layer, self.expert = layer, expert

    def product(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        rows = x.reshape(-1, self.layer.in_features)
        experts = torch.arange(self.layer.experts, device=x.device)
        ends = (experts >= self.expert).int() * len(rows)
        return self.layer(rows, ends).view(*x.shape[:-1], self.layer.out_features)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Tensor:
        weight = _operand(args, kwargs, OneExpert)
        layer, matmul = weight.layer, func in (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if func is functional.linear and _second(args) is weight and not layer.stores_transposed:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return weight.product(args[0]) if bias is None else weight.product(args[0]) + bias
        if matmul and _second(args) is weight and layer.stores_transposed:
            return weight.product(args[0])
        refuse(layer, func.__name__)


def refuse(layer: GroupedProduct, what: str) -> NoReturn:
    """
    Raises:
        RuntimeError: for what needs the weights of all experts as a tensor.
    """
    raise RuntimeError(
        f"'{what}' takes the weights of {layer!r} as one tensor, but they are sparse. Use layer.weight for a dense "
        "copy, densify(model), or name the layer in exclude_modules."
    )


def _second(args: tuple):
    return args[1] if len(args) > 1 else None


def _operand(args: tuple, kwargs: dict | None, kind: type):
    """The first of a function's arguments that is one of these, also inside a list."""
    given = [*args, *(kwargs or {}).values()]
    flat = [inner for arg in given for inner in (arg if isinstance(arg, list | tuple) else (arg,))]
    return next(arg for arg in flat if isinstance(arg, kind))

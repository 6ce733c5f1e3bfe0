"""
The experts of mixture-of-experts blocks as transformers holds them: several 3-D parameters of one module, whose
forward is looked up in a public registry by the name that the configuration gives. `"topkast"` in it is ours.

Only experts that are sparse run it: their module gets a view of the configuration of its own, in which it stands, so
that neither experts that stay dense nor who changes the model's configuration later (`generate` does) is concerned.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..block_order import inverse
from ..ops import runs_one_token
from ..ops.grouped import owners
from ..ops.reordering import reorder
from ..storage import dense_state
from .grouped import TopKastGroupedLinear
from .stacked import GroupedProduct, StackedMatrices


if TYPE_CHECKING:
    from ..ops.one_token import ExpertsOfOneToken

EXPERTS_FUNCTION = "topkast"
# Parameters of classes without transformers' decorator that are multiplied by, one expert at a time or all at once:
# whether they are (experts, in, out), and how gate and up lie in the rows.
UNDECORATED: dict[str, dict[str, tuple[bool, str | None]]] = {
    "JetMoeParallelExperts": {"weight": (False, None)},
    "LongcatFlashExperts": {"gate_up_proj": (False, "halves"), "down_proj": (False, None)},
    "Llama4TextExperts": {"gate_up_proj": (True, "halves"), "down_proj": (True, None)},
    "InklingSharedExperts": {"gate_proj": (False, None), "up_proj": (False, None), "down_proj": (False, None)},
}
# Of a class of which one member of two has gate and up, by where it stands.
HALVES_BY_PLACE = (("JetMoeParallelExperts", "mlp.input_linear"),)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(eq=False)
class ExpertStack(StackedMatrices):
    """
    A 3-D parameter of an experts module, as a dense layer that can become sparse.

    Attributes:
        owner (`torch.nn.Module`): the experts module.
        key (`str`): the parameter's name in it.
        stores_transposed (`bool`): whether it is (experts, in, out).
        halves (`str`, *optional*): how gate and up lie in the rows of an expert: `"halves"`, all of the gate first,
            `"interleaved"`, in turn, or `None`, if there is only one of them.
    """

    owner: nn.Module
    key: str
    stores_transposed: bool
    halves: str | None = None

    bias = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.owner._parameters[self.key]

    @property
    def training(self) -> bool:
        """The mode of the experts module."""
        return self.owner.training

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Of one expert."""
        return self.weight.shape[2 if self.stores_transposed else 1]

    @property
    def in_features(self) -> int:
        """Of one expert."""
        return self.weight.shape[1 if self.stores_transposed else 2]

    def empty(self):
        """Takes the numbers out: zero rows and columns of every expert are left."""
        self._set(self.weight.new_empty(self.experts, 0, 0))

    def fill(self, rows: Tensor):
        """Puts numbers in, (experts · out, in)."""
        stock = rows.view(self.experts, -1, rows.shape[1])
        self._set(stock.mT.contiguous() if self.stores_transposed else stock)

    def _set(self, stock: Tensor):
        self.owner._parameters[self.key] = nn.Parameter(stock, requires_grad=self.weight.requires_grad)

    @property
    def unused(self) -> int:
        """How many of the last experts no token can come to: LongCat Flash has room for experts that do nothing."""
        return getattr(self.owner, "zero_expert_num", 0) if self.key == "gate_up_proj" else 0


def is_decorated(module: nn.Module) -> bool:
    """Whether a module holds experts in transformers' way."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """The 3-D parameters of experts modules that are known here, by name."""
    return {
        f"{name}.{stack.key}" if name else stack.key: stack
        for name, module in model.named_modules()
        for stack in _stacks_of(module, name)
    }


def layer_named(model: nn.Module, name: str) -> nn.Module | ExpertStack | None:
    """The layer of a name: a module, or a 3-D parameter of experts; `None` if there is neither."""
    owner, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    found = next((stack for stack in _stacks_of(module, owner) if stack.key == key), None)
    return module._modules.get(key) if found is None else found


def _stacks_of(module: nn.Module, name: str) -> Iterator[ExpertStack]:
    """Those whose numbers are as they are computed with: not quantised, and not spread over processes."""
    kind = type(module).__name__
    if is_decorated(module):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        halves = (None if not module.has_gate else "halves" if module.is_concatenated else "interleaved"), None
        known = {key: (module.is_transposed, how) for key, how in zip((first, "down_proj"), halves)}
    else:
        known = UNDECORATED.get(kind, {})
    stacked = {key for key, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3}
    if not stacked <= known.keys():
        return
    for key, (transposed, halves) in known.items():
        parameter = module._parameters.get(key)
        if key in stacked and parameter.dtype in FLOATS and not isinstance(parameter, DTensor):
            by_place = any(kind == each and name.endswith(place) for each, place in HALVES_BY_PLACE)
            yield ExpertStack(module, key, transposed, "halves" if by_place else halves)


def put_layer(owner: nn.Module, key: str, layer: GroupedProduct):
    """Puts a layer in the place of a 3-D parameter of an experts module, which runs our function from then on."""
    owner.__dict__.setdefault("_stock_order", list(owner._parameters))
    delattr(owner, key)  # torch refuses a module where a parameter is
    setattr(owner, key, layer)
    layer._is_hf_initialized = True  # or transformers would draw it anew where the model becomes part of another
    if is_decorated(owner) and not hasattr(owner.config, "_stock_config"):
        stock, owner.config = owner.config, copy.copy(owner.config)
        object.__setattr__(owner.config, "_stock_config", stock)
        owner.config._experts_implementation_internal = EXPERTS_FUNCTION
    if not any(hook.hook is _refuse_dense_state for hook in owner._load_state_dict_pre_hooks.values()):
        owner.register_load_state_dict_pre_hook(_refuse_dense_state)


def put_parameter(owner: nn.Module, key: str, parameter: nn.Parameter):
    """Puts a 3-D parameter back in its place; once all are back the experts module runs its own function."""
    delattr(owner, key)
    owner.register_parameter(key, parameter)
    if any(isinstance(child, GroupedProduct) for child in owner.children()):
        return
    order = owner.__dict__.pop("_stock_order")
    owner._parameters = {key: owner._parameters[key] for key in sorted(owner._parameters, key=order.index)}
    if hasattr(owner, "config"):
        owner.config = getattr(owner.config, "_stock_config", owner.config)
    hooks = owner._load_state_dict_pre_hooks
    for number in [number for number, hook in hooks.items() if hook.hook is _refuse_dense_state]:
        del hooks[number]


def _refuse_dense_state(module, state_dict, prefix, metadata, strict, missing, unexpected, errors):
    """A layer in the place of a parameter does not see the parameter's name among those of its own."""
    for key, child in module._modules.items():
        if isinstance(child, TopKastGroupedLinear) and f"{prefix}{key}" in state_dict:
            errors.append(dense_state(f"{prefix}{key}", f"{prefix}{key}"))


def topkast_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """
    The forward of an experts module with sparse layers, for transformers' registry of such functions.

    Args:
        self (`torch.nn.Module`): the experts module.
        hidden_states (`torch.Tensor`): (tokens, hidden).
        top_k_index (`torch.Tensor`): (tokens, k), the experts of each token. Those past the last one give zero: they
            are not here.
        top_k_weights (`torch.Tensor`): (tokens, k).

    Returns:
        `torch.Tensor`: (tokens, hidden): the sum of the experts' outputs by their weights.

    Raises:
        ValueError: if neither of the module's parameters is sparse.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    layers = [getattr(self, key) for key in (first, "down_proj")]
    if not any(isinstance(layer, GroupedProduct) for layer in layers):
        raise ValueError(
            f"experts_implementation={EXPERTS_FUNCTION!r} is what sparsify gives experts that it makes sparse; those "
            f"of {type(self).__name__} are dense. Leave it out."
        )
    biases = [getattr(self, f"{key}_bias") if self.has_bias else None for key in (first, "down_proj")]
    (count, top_k), weights = top_k_index.shape, top_k_weights.reshape(-1, 1)
    products = _products_of_one_token(layers, biases, hidden_states, top_k_index)
    if products:  # there is nothing to sort
        y = _outputs(self, hidden_states, products, weights)
    else:
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        experts = torch.arange(layers[0].shape[0], dtype=chosen.dtype, device=chosen.device)
        ends = torch.searchsorted(chosen, experts, right=True).int()
        products = [
            functools.partial(_product, layer, ends=ends, bias=bias, is_transposed=self.is_transposed)
            for layer, bias in zip(layers, biases)
        ]
        y = _outputs(self, hidden_states[order // top_k], products, weights[order])
        # Not added to where each token is: sums of equal weights would depend on the order of threads.
        y = y[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]
    return y.view(count, top_k, -1).sum(1).to(hidden_states.dtype)


def _outputs(self: nn.Module, x: Tensor, products: list[Callable[[Tensor], Tensor]], weights: Tensor) -> Tensor:
    """What experts make of rows of inputs, times weights, (rows, 1)."""
    y = products[0](x)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = products[1](y)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return y * weights


def _products_of_one_token(
    layers: list[GroupedProduct | Tensor], biases: list[Tensor | None], x: Tensor, top_k_index: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """The two products with the experts of one token, a row for each in their order; none if there is more to do."""
    if not all(isinstance(layer, TopKastGroupedLinear) for layer in layers) or top_k_index.dtype != torch.int64:
        return []
    if not all(runs_one_token(x, layers[0].in_features, layer.backend) for layer in layers):
        return []
    prepared = [layer.for_one_token() for layer in layers]
    biases = [None if bias is None else reorder(bias, layer.row_stride) for layer, bias in zip(layers, biases)]
    if not all(product and product.takes(bias) for product, bias in zip(prepared, biases)):
        return []
    chosen = top_k_index.reshape(-1)
    return [
        functools.partial(_product_of_one_token, layer, product, chosen, bias)
        for layer, product, bias in zip(layers, prepared, biases)
    ]


def _product_of_one_token(
    layer: TopKastGroupedLinear, product: "ExpertsOfOneToken", chosen: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    return reorder(product(x, chosen, bias), inverse(layer.row_stride, layer.out_features))


def _product(
    layer: GroupedProduct | Tensor, x: Tensor, ends: Tensor, bias: Tensor | None, is_transposed: bool
) -> Tensor:
    """By a layer, or by a parameter that stays dense beside a sparse one."""
    if isinstance(layer, GroupedProduct):
        return layer(x, ends, bias)
    from transformers.integrations.moe import _grouped_linear  # private: nobody else is to need it

    owner = owners(ends, len(x))
    outside = (owner == len(ends))[:, None]  # transformers' product leaves these as they are in memory
    own = None if bias is None else bias[owner.clamp(max=len(ends) - 1)]
    y = _grouped_linear(x.masked_fill(outside, 0), layer, ends, own, is_transposed)
    return y.masked_fill(outside, 0)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, topkast_experts_forward)

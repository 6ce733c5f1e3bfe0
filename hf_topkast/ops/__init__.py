"""
The masked products of a sparse layer, y = x·αᵀ + b, dX = dY·α and dW|B, as torch operators over several backends.

A backend is a module with three functions of one signature, `forward`, `grad_input` and `grad_values`; see
`reference.py` for what each takes and returns. Which one runs is decided for each product by `implementation`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.utils import logging

from ..storage import Pattern
from . import composite, costs, reference


if TYPE_CHECKING:
    from .one_token import Prepared

logger = logging.get_logger(__name__)

BACKENDS: dict[str, ModuleType] = {"reference": reference}

try:
    from . import cpu, expanded
except ImportError as error:  # installed without a compiler
    WHY_NO_CPU = str(error)
else:
    WHY_NO_CPU = ""
    BACKENDS.update(cpu=cpu, expanded=expanded)


def select_backend(name: str) -> str:
    """
    Checks the configuration's `backend`: `"auto"`, chosen at each product by device and dtype, a key of `BACKENDS`, or
    `"triton"`, which is imported only where it is asked for or a GPU is at work.

    Raises:
        ValueError: if there is no such backend; the message lists those there are.
    """
    if name == "triton" and not has_triton():
        raise ValueError("backend='triton' needs Triton, which is not installed: pip install 'hf-topkast[gpu]'.")
    if name not in ("auto", "triton", *BACKENDS):
        raise ValueError(f"backend={name!r} is not allowed: it must be 'auto', 'triton' or one of {sorted(BACKENDS)}.")
    return name


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is beside the builds of torch for GPUs."""
    return importlib.util.find_spec("triton") is not None


def load_backend(name: str) -> ModuleType:
    """The module of a backend that [`select_backend`] allows."""
    return importlib.import_module(".triton", __package__) if name == "triton" else BACKENDS[name]


def implementation(backend: str, product: str, x: Tensor, pattern: Pattern) -> ModuleType:
    """
    The module that runs a product with the dense operand `x`.

    For `"auto"` it is the Triton kernels on a GPU, where Triton is installed; on the CPU, in float32 and bfloat16, the
    faster of the C++ backends, sparse kernels and expanded α, where they are built; and else the reference.
    """
    if backend != "auto":
        return load_backend(backend)
    if x.device.type == "cuda" and has_triton():
        return load_backend("triton")
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        if "cpu" in BACKENDS:
            return BACKENDS["cpu" if costs.sparse_is_faster(product, x, pattern) else "expanded"]
        logger.warning_once(
            f"hf_topkast runs without its C++ kernels ({WHY_NO_CPU}): sparse layers save memory but no time. To build "
            "them install a C++17 compiler with OpenMP (g++ 12, clang 15) and reinstall with --no-cache-dir "
            "--no-binary hf-topkast."
        )
    return reference


def masked_linear(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, backend: str) -> Tensor:
    """
    The product of a Top-KAST layer: y = x·αᵀ + b, where α holds the values of A and is zero elsewhere.

    Its backward gives dX = dY·α and, for every slot of B, the dense-formula gradient dYᵀX at that place: straight
    through for the slots of B\\A, which the forward pass does not use (the paper's §2.2).
    Under `torch.func`, with dual numbers and for derivatives of derivatives it is composed of dense operations.

    Args:
        x (`torch.Tensor`): floating point, (..., in).
        values (`torch.Tensor`): floating point, (|B|,), in the slot order of `pattern`.
        pattern ([`Pattern`]): where the values stand.
        bias (`torch.Tensor`, *optional*): (out,).
        backend (`str`): as [`select_backend`] allows.

    Returns:
        `torch.Tensor`: (..., out), in the dtype of `x`, or autocast's where autocast is on.

    Raises:
        ValueError: if the operands do not fit each other, in shape or device.
    """
    _check_operands(x, values, pattern, bias)
    device_type = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled() and runs_at_once(x) and have_numbers(values, pattern.columns, bias):
        # Without a graph to build, past the dispatcher: it costs as much as the product of one token.
        return implementation(backend, "forward", x, pattern).forward(x, values, pattern, bias)
    if composite.is_needed():
        return composite.forward(x, values, pattern, bias)
    structure = pattern.row_offsets, pattern.columns, pattern.column_walk
    return _linear(x, values, *structure, bias, pattern.block_size, backend)


def runs_one_token(x: Tensor, in_features: int, backend: str) -> bool:
    """Whether an input is what [`prepare_one_token`] is for: one float32 token on the CPU, with no gradient wanted."""
    return (
        not torch.is_grad_enabled()
        and runs_at_once(x)
        and x.dtype is torch.float32
        and x.is_cpu
        and x.numel() == in_features
        and x.ndim > 0
        and x.shape[-1] == in_features
        and not torch.is_autocast_enabled("cpu")
        and backend in ("auto", "cpu")
        and "cpu" in BACKENDS
    )


def prepare_one_token(
    values: Tensor, pattern: Pattern, bias: Tensor | None, experts: int | None = None
) -> "Prepared | None":
    """
    The product of one token with these weights, with a number of experts with those of them that are chosen; `None` if
    it is not for the type or place of the weights.
    """
    from .one_token import prepare  # which only an installation with kernels can

    return prepare(values, pattern, bias, experts)


def _check_operands(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None):
    """Backends hand over addresses: what does not fit would be read past its end."""
    if x.ndim == 0 or x.shape[-1] != pattern.shape[1]:
        raise ValueError(
            f"An input of shape {tuple(x.shape)} does not fit a sparse layer of {pattern.shape[1]} inputs and "
            f"{pattern.shape[0]} outputs: its last dimension must be {pattern.shape[1]}."
        )
    if values.shape[0] != pattern.stored or (bias is not None and bias.shape != pattern.shape[:1]):
        raise ValueError(
            f"{values.shape[0]} values{'' if bias is None else f' and a bias of shape {tuple(bias.shape)}'} are not "
            f"those of a sparse layer of {pattern.shape[0]} outputs and {pattern.stored} stored weights."
        )
    for name, operand in (("values", values), ("columns", pattern.columns), ("bias", bias)):
        if operand is not None and operand.device != x.device:
            raise ValueError(
                f"The input is on {x.device} and the layer's {name} on {operand.device}: move the model, or the input."
            )


def runs_at_once(x: Tensor) -> bool:
    """Whether a product may bypass the dispatcher: nothing traces it, transforms it or stands in for its numbers."""
    return type(x) is Tensor and not (
        x.is_meta
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or composite.is_needed()
        or is_in_torch_dispatch_mode()
    )


def have_numbers(*weights: Tensor | None) -> bool:
    """Whether these are ordinary tensors, and none stands for numbers that are elsewhere, as those of FSDP2 do."""
    return all(weight is None or type(weight) in (Tensor, torch.nn.Parameter) for weight in weights)


@torch.library.custom_op("hf_topkast::linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    column_walk: Tensor | None,
    bias: Tensor | None,
    block_size: Sequence[int],
    backend: str,
) -> Tensor:
    if composite.in_forward_mode():
        raise NotImplementedError(
            "This graph was traced or exported without forward-mode differentiation, and its sparse layers would give "
            "tangents of zero: differentiate the model itself, or trace a copy made dense by hf_topkast.densify."
        )
    pattern = Pattern(row_offsets, columns, (_out_features(row_offsets, block_size), x.shape[-1]), tuple(block_size))
    y = implementation(backend, "forward", x, pattern).forward(x, values, pattern, bias)
    # Not as a view of a local tensor: autograd would refuse `y.add_(...)`, which models may do.
    return torch.ops.aten._unsafe_view(y, y.shape)


@_linear.register_fake
def _(x, values, row_offsets, columns, column_walk, bias, block_size, backend):
    return x.new_empty(*x.shape[:-1], _out_features(row_offsets, block_size))


def _out_features(row_offsets: Tensor, block_size: Sequence[int]) -> int:
    return row_offsets.shape[0] // 2 * block_size[0]


@torch.library.custom_op("hf_topkast::linear_grad_input", mutates_args=())
def _linear_grad_input(
    dy: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    column_walk: Tensor | None,
    in_features: int,
    block_size: Sequence[int],
    backend: str,
) -> Tensor:
    pattern = Pattern(row_offsets, columns, (dy.shape[-1], in_features), tuple(block_size), column_walk)
    return implementation(backend, "grad_input", dy, pattern).grad_input(dy, values, pattern)


@_linear_grad_input.register_fake
def _(dy, values, row_offsets, columns, column_walk, in_features, block_size, backend):
    return dy.new_empty(*dy.shape[:-1], in_features)


@torch.library.custom_op("hf_topkast::linear_grad_values", mutates_args=())
def _linear_grad_values(
    dy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, block_size: Sequence[int], backend: str
) -> Tensor:
    pattern = Pattern(row_offsets, columns, (dy.shape[-1], x.shape[-1]), tuple(block_size))
    return implementation(backend, "grad_values", x, pattern).grad_values(dy, x, pattern)


@_linear_grad_values.register_fake
def _(dy, x, row_offsets, columns, block_size, backend):
    return x.new_empty(columns.shape[0] * block_size[0] * block_size[1])


def _setup_context(ctx, inputs, output):
    x, values, row_offsets, columns, column_walk, bias, block_size, backend = inputs
    # Only through save_for_backward: gradient checkpointing and compile drop and recompute what it holds.
    ctx.save_for_backward(x, values, row_offsets, columns, column_walk)
    ctx.has_bias = bias is not None
    ctx.settings = block_size, backend


def _backward(ctx, dy):
    x, values, row_offsets, columns, column_walk = ctx.saved_tensors
    structure = row_offsets, columns
    need_x, need_values, *_, need_bias, _, _ = ctx.needs_input_grad
    if torch.is_grad_enabled() or composite.is_needed():  # with create_graph: derivatives of these are wanted in turn
        pattern = Pattern(*structure, (dy.shape[-1], x.shape[-1]), tuple(ctx.settings[0]))
        dx = composite.grad_input(dy, values, pattern) if need_x else None
        dvalues = composite.grad_values(dy, x, pattern) if need_values else None
    else:
        dx = _linear_grad_input(dy, values, *structure, column_walk, x.shape[-1], *ctx.settings) if need_x else None
        dvalues = _linear_grad_values(dy, x, *structure, *ctx.settings) if need_values else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.has_bias and need_bias else None
    return dx, dvalues, None, None, None, dbias, None, None


torch.library.register_autograd("hf_topkast::linear", _backward, setup_context=_setup_context)

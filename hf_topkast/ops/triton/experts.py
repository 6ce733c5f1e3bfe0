"""
The products of experts whose patterns are unstructured or of small blocks, and float64: through a dense α of all of
them. How many rows each expert has only the GPU knows, so every launch has as many programs as any split of the rows
over the experts may need, and each finds its expert from `ends`.

α is made for experts that have rows, and dW is read at B from the dense gradients of some experts at a time. Where
torch's own grouped product does not wait either, it multiplies by α.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...storage import Pattern
from ..grouped import owners
from ..reference import rows_per_chunk
from .block_sparse import precision
from .expand import expand_active, gather_stored
from .launch import INTERPRETED
from .pieces import add_product, count_tiles, rows_of_expert, rows_of_tile
from .tiles import scale_of, time_briefly


# Rows, outputs and features of a tile, warps, stages.
PRODUCT_TILES = [
    (64, 64, 32, 4, 3),
    (16, 64, 64, 4, 4),
    (64, 128, 32, 4, 4),
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
]
# Outputs and features of a tile, rows that are multiplied at a time, warps, stages.
GRADIENT_TILES = [(64, 64, 32, 4, 3), (64, 128, 32, 4, 4), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3)]
PRODUCT_KEY = ["scale", "y_features", "x_features", "TRANSPOSED", "EXPERTS", "PRECISION"]
GRADIENT_KEY = ["scale", "height", "out_features", "in_features", "PRECISION"]
# torch's grouped product takes so many groups, and lines that begin at multiples of so many bytes.
MAX_GROUPS, ALIGNMENT = 1023, 16


def configurations(tiles: list[tuple[int, int, int, int, int]], *names: str) -> list[triton.Config]:
    """As [`tiles.configurations`], for tiles with a third side."""
    return [
        triton.Config({**dict(zip(names, sides)), "STAGES": stages}, num_warps=warps)
        for *sides, warps, stages in (tiles[:1] if INTERPRETED else tiles)
    ]


@triton.jit
def _no_sums(like, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in which products of these numbers are summed."""
    if like.dtype.element_ty == tl.float64:
        return tl.zeros((ROWS, COLUMNS), tl.float64)
    else:
        return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.autotune(
    configurations(PRODUCT_TILES, "TILE_ROWS", "TILE_N", "TILE_K"), key=PRODUCT_KEY, do_bench=time_briefly
)
@triton.jit(do_not_specialize=["scale"])
def _product_kernel(
    x,
    alpha,
    bias,
    y,
    ends,
    rows,
    scale,
    y_features,
    x_features,
    TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of one expert's rows times `TILE_N` outputs of its α, which is (in, out) with `TRANSPOSED`."""
    strips = tl.cdiv(y_features, TILE_N)
    n = tl.program_id(0) % strips * TILE_N + tl.arange(0, TILE_N)
    inside = (n < y_features)[None, :]
    expert, first, end = rows_of_tile(tl.program_id(0) // strips, ends, rows, EXPERTS, TILE_ROWS)
    row = (first + tl.arange(0, TILE_ROWS))[:, None].to(tl.int64)
    present = row < end
    own_alpha = alpha + expert.to(tl.int64) * y_features * x_features
    total = _no_sums(x, TILE_ROWS, TILE_N)
    for start in tl.range(0, tl.where(expert < EXPERTS, x_features, 0), TILE_K, num_stages=STAGES):
        k = start + tl.arange(0, TILE_K)
        exists = k < x_features
        inputs = tl.load(x + row * x_features + k[None, :], mask=present & exists[None, :], other=0)
        places = k[:, None] * y_features + n[None, :] if TRANSPOSED else k[:, None] + n[None, :] * x_features
        weights = tl.load(own_alpha + places, mask=exists[:, None] & inside, other=0)
        total = add_product(total, inputs, weights, PRECISION)
    if bias is not None:
        place = expert * y_features + n
        offset = tl.load(bias + place, mask=(n < y_features) & (place < EXPERTS * y_features), other=0)
        total += offset.to(total.dtype)[None, :]
    tl.store(y + row * y_features + n[None, :], total.to(y.dtype.element_ty), mask=present & inside)


@triton.autotune(
    configurations(GRADIENT_TILES, "TILE_M", "TILE_N", "TILE_ROWS"), key=GRADIENT_KEY, do_bench=time_briefly
)
@triton.jit(do_not_specialize=["scale", "first_expert", "first_output"])
def _gradient_kernel(
    dy,
    x,
    dense,
    ends,
    first_expert,
    first_output,
    scale,
    height,
    out_features,
    in_features,
    PRECISION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of the dense gradient of one expert, of which `height` outputs are wanted."""
    strips, tiles = tl.cdiv(in_features, TILE_N), tl.cdiv(height, TILE_M)
    n = (tl.program_id(0) % strips * TILE_N + tl.arange(0, TILE_N))[None, :]
    m = (tl.program_id(0) // strips % tiles * TILE_M + tl.arange(0, TILE_M))[None, :]
    place = tl.program_id(0) // (strips * tiles)
    begin, end = rows_of_expert(first_expert + place, ends)
    total = _no_sums(x, TILE_M, TILE_N)
    for first in tl.range(begin, end, TILE_ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, TILE_ROWS))[:, None].to(tl.int64)
        present = row < end
        outer = tl.load(dy + row * out_features + first_output + m, mask=present & (m < height), other=0)
        inputs = tl.load(x + row * in_features + n, mask=present & (n < in_features), other=0)
        total = add_product(total, tl.trans(outer), inputs, PRECISION)
    line = place.to(tl.int64) * height + tl.trans(m)
    inside = (tl.trans(m) < height) & (n < in_features)
    tl.store(dense + line * in_features + n, total.to(dense.dtype.element_ty), mask=inside)


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, ends: Tensor) -> Tensor:
    """y = x·αₑᵀ + bₑ: (rows, in) → (rows, out)."""
    alpha = expand_active(values, pattern, x.dtype, ends).view(len(ends), -1, pattern.shape[1])
    if torch_does_not_wait(x, alpha):
        return _multiply_by_torch(x, alpha.mT, ends, bias)
    return _multiply(x, alpha, ends, bias, transposed=False)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, ends: Tensor) -> Tensor:
    """dX = dY·αₑ: (rows, out) → (rows, in)."""
    alpha = expand_active(values, pattern, dy.dtype, ends).view(len(ends), -1, pattern.shape[1])
    if torch_does_not_wait(dy, alpha):
        return _multiply_by_torch(dy, alpha, ends, None)
    return _multiply(dy, alpha, ends, None, transposed=True)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, ends: Tensor) -> Tensor:
    """dW|B: (rows, out), (rows, in), of one dtype → (|B|,)."""
    gradient = torch.empty(pattern.stored, dtype=x.dtype, device=x.device)
    for first, experts, height in _chunks(pattern, len(ends)):
        dense = torch.empty(experts * height, x.shape[1], dtype=x.dtype, device=x.device)
        _write_dense_gradient(dense, dy, x, ends, first, height)
        gather_stored(dense, gradient, pattern, first)
    return gradient


def _write_dense_gradient(dense: Tensor, dy: Tensor, x: Tensor, ends: Tensor, first: int, height: int):
    """The dense gradients of some experts, or of some rows of one: `height` of each, from the row `first` on."""
    out_features, in_features = dy.shape[1], x.shape[1]

    def grid(meta):
        tiles = triton.cdiv(height, meta["TILE_M"]) * triton.cdiv(in_features, meta["TILE_N"])
        return (len(dense) // height * tiles,)

    _gradient_kernel[grid](
        dy,
        x,
        dense,
        ends,
        *divmod(first, out_features),
        scale_of(len(x) // len(ends)),
        height,
        out_features,
        in_features,
        PRECISION=_precision(x),
    )


def torch_does_not_wait(x: Tensor, alpha: Tensor) -> bool:
    """
    Whether torch's grouped product reads the ends of groups on the GPU: of torch 2.11 to 2.13 only that of bfloat16 on
    GPUs of compute capability 9 and 10 does. Every other copies them to the host and loops there.
    """
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and torch.version.hip is None
        and len(alpha) <= MAX_GROUPS
        and x.data_ptr() % ALIGNMENT == 0
        and all(side * x.element_size() % ALIGNMENT == 0 for side in alpha.shape[1:])
    )


def _chunks(pattern: Pattern, count: int) -> Iterator[tuple[int, int, int]]:
    """
    The rows of the stack of which the dense gradient exists at once: the first one, how many experts, and of each how
    many rows. They are all rows of some experts, or some of one.
    """
    out_features, limit = pattern.shape[0] // count, rows_per_chunk(pattern)
    together, height = max(1, limit // out_features), min(limit, out_features)
    for expert in range(0, count, together):
        for output in range(0, out_features, height):
            yield (
                expert * out_features + output,
                min(together, count - expert),
                min(height, out_features - output),
            )


def _multiply(x: Tensor, alpha: Tensor, ends: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x·αₑᵀ + bₑ, or x·αₑ, with α as (experts, out, in)."""
    y_features = alpha.shape[2 if transposed else 1]
    y = torch.empty(len(x), y_features, dtype=x.dtype, device=x.device)

    def grid(meta):
        tiles = count_tiles(len(x), len(ends), meta["TILE_ROWS"])
        return (tiles * triton.cdiv(y_features, meta["TILE_N"]),)

    if y.numel():
        _product_kernel[grid](
            x,
            alpha,
            bias,
            y,
            ends,
            len(x),
            scale_of(len(x) // len(ends)),
            y_features,
            x.shape[1],
            TRANSPOSED=transposed,
            EXPERTS=len(ends),
            PRECISION=_precision(x),
        )
    return y


def _multiply_by_torch(x: Tensor, matrices: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """x·mₑ + bₑ, with m as (experts, features of x, features of y)."""
    y = torch.nn.functional.grouped_mm(x, matrices, offs=ends)
    owner = owners(ends, len(x))
    if bias is not None:
        y = y + bias.to(y.dtype)[owner.clamp(max=len(ends) - 1)]
    return torch.where((owner < len(ends))[:, None], y, 0)  # torch leaves the others as they were in memory


def _precision(x: Tensor) -> str:
    """Of products of these numbers: only fp32 may be rounded."""
    return precision() if x.dtype == torch.float32 else "ieee"

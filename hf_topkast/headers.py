"""
What checkpoint files say about themselves: the headers of safetensors files, and single tensors mapped into memory.

It knows neither torch nor a model, so that files of any size are looked at in no time.
"""

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np


STATE_NAME = "topkast_state.safetensors"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Of the state file. 1, of 0.1.0, had one digest a layer, of its weights in the dtype they were saved in; else it is
# the same.
READABLE_VERSIONS = ("1", "2")

# The format's own limit, so that what is no safetensors file is not read as a header of exabytes.
LARGEST_HEADER = 100_000_000
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
}


class TensorHeader(NamedTuple):
    """One tensor of a file: its type as safetensors names it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.end - self.begin


class FileHeader(NamedTuple):
    """
    The header of a safetensors file.

    Attributes:
        path (`Path`): the file.
        metadata (`dict[str, str]`): what its writer noted.
        tensors (`dict[str, TensorHeader]`): its tensors by name.
        data (`int`, *optional*): where in the file the tensors begin; `None` if the file itself is not here.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]
    data: int | None = None

    def numbers(self, name: str) -> np.ndarray:
        """
        A tensor, mapped into memory, read-only; bfloat16 comes as its bits, uint16.

        Raises:
            ValueError: if it has a type that numpy does not know, or the file is not here.
        """
        tensor = self.tensors[name]
        if self.data is None:
            raise ValueError(f"{self.path} is on the hub, and this needs its numbers: download it first.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{self.path}: '{name}' has the type {tensor.dtype}, which cannot be read here.")
        if not tensor.nbytes:
            return np.empty(tensor.shape, DTYPES[tensor.dtype])
        return np.memmap(self.path, DTYPES[tensor.dtype], "r", self.data + tensor.begin, tensor.shape)


def read_header(path: str | os.PathLike) -> FileHeader:
    """
    The header of a safetensors file, and nothing else of it.

    Raises:
        ValueError: if it is no such file, or shorter than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("it begins with no header")
            entries = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        metadata = entries.pop("__metadata__", {})
        tensors = {
            name: TensorHeader(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error}).") from error
    missing = 8 + length + max((tensor.end for tensor in tensors.values()), default=0) - size
    if missing > 0:
        raise ValueError(f"{path} is truncated: {missing:,} bytes are missing at its end.")
    return FileHeader(path, metadata, tensors, 8 + length)


def as_floats(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as [`FileHeader.numbers`] gives them, of the safetensors type `dtype`, as float32 or float64."""
    if dtype == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64 if dtype == "F64" else np.float32)


def count_nonzero(numbers: np.ndarray, dtype: str, chunk: int = 2**24) -> int:
    """How many elements are not zero, of either sign, read piece by piece."""
    flat = numbers.reshape(-1)
    pieces = (flat[begin : begin + chunk] for begin in range(0, flat.size, chunk))
    return sum(int(np.count_nonzero(piece & 0x7FFF if dtype == "BF16" else piece)) for piece in pieces)


def count_bits(packed: np.ndarray, chunk: int = 2**20) -> int:
    """How many bits are set in bytes, read piece by piece."""
    pieces = (packed[begin : begin + chunk] for begin in range(0, packed.size, chunk))
    return sum(int(BITS[piece].sum(dtype=np.int64)) for piece in pieces)


def unpack_bits(packed: np.ndarray, numel: int) -> np.ndarray:
    """Bits as the state file packs them, bit i of byte j first at 8·j + i: bool, (numel,)."""
    return np.unpackbits(packed, count=numel, bitorder="little").view(bool)


BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)

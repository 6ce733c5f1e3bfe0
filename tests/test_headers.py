import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_topkast.headers import as_floats, count_bits, count_nonzero, read_header, unpack_bits
from hf_topkast.storage import pack_bits


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_those_that_were_saved(tmp_path, dtype):
    saved = {"a": torch.randn(3, 5).mul(3).to(dtype), "empty": torch.zeros(0, dtype=dtype), "b": torch.ones(7)}
    save_file(saved, tmp_path / "file.safetensors", {"key": "value"})
    header = read_header(tmp_path / "file.safetensors")
    assert header.metadata == {"key": "value"} and set(header.tensors) == set(saved)
    assert header.tensors["a"].shape == (3, 5) and header.tensors["a"].nbytes == saved["a"].nbytes
    floats = as_floats(header.numbers("a"), header.tensors["a"].dtype)
    np.testing.assert_array_equal(floats, saved["a"].to(torch.float64 if dtype == torch.float64 else torch.float32))
    assert header.numbers("empty").shape == (0,)
    np.testing.assert_array_equal(header.numbers("b"), np.ones(7))


def test_bits_are_those_of_the_state_file():
    mask = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_bits(mask).numpy()
    np.testing.assert_array_equal(unpack_bits(packed, 1003), mask.numpy())
    assert count_bits(packed) == count_bits(packed, chunk=7) == int(mask.sum())


def test_counting_goes_piece_by_piece():
    numbers = np.array([[0.0, -0.0, 1.0], [2.0, np.nan, 0.0]], np.float32)
    assert count_nonzero(numbers, "F32") == count_nonzero(numbers, "F32", chunk=2) == 3


def test_damaged_files(tmp_path):
    path = tmp_path / "file.safetensors"
    for content in (b"", b"123", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or is damaged"):
            read_header(path)
    save_file({"a": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated: 3 bytes are missing"):
        read_header(path)

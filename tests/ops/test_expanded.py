"""The products through an expanded α against the reference."""

import pytest
import torch
from test_reference import problem

from hf_topkast.ops import reference


expanded = pytest.importorskip(
    "hf_topkast.ops.expanded", reason="the C++ extension is not built", exc_type=ImportError
)

SHAPES = [(1, 1), (3, 5), (17, 1), (64, 48), (172, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shares", [(0.3, 0.6), (0.0, 0.5), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 7])
def test_products_equal_the_reference(shape, shares, dtype, tokens):
    _, _, pattern, values, x, dy = problem(shape, tokens, shares, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    assert torch.equal(expanded.expand_active(values, pattern), reference.expand_active(values, pattern))
    for got, want in (
        (expanded.forward(x, values, pattern, bias), reference.forward(x, values, pattern, bias)),
        (expanded.grad_input(dy, values, pattern), reference.grad_input(dy, values, pattern)),
        (expanded.grad_values(dy, x, pattern), reference.grad_values(dy, x, pattern)),
    ):
        assert got.dtype == want.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", [(4, 1), (1, 3), (16, 16), (3, 32)])
def test_blocks(block_size):
    _, _, pattern, values, x, dy = problem((48, 96), dtype=torch.float32, block_size=block_size)
    assert torch.equal(expanded.expand_active(values, pattern), reference.expand_active(values, pattern))
    assert torch.equal(expanded.grad_values(dy, x, pattern), reference.grad_values(dy, x, pattern))


def test_layers_of_several_chunks(monkeypatch):
    monkeypatch.setattr(reference, "MIN_CHUNK_ELEMENTS", 2**16)
    _, _, pattern, _, x, dy = problem((1000, 300), tokens=3, shares=(0.01, 0.02), dtype=torch.float32)
    assert reference.rows_per_chunk(pattern) < 1000
    assert torch.equal(expanded.grad_values(dy, x, pattern), reference.grad_values(dy, x, pattern))


def test_strange_inputs():
    _, _, pattern, values, x, _ = problem((30, 50), dtype=torch.float32)
    strange = x.T.contiguous().T, values.repeat_interleave(2)[::2]
    # Dense products of memory that is laid out otherwise add up in another order on some CPUs.
    found, expected = expanded.forward(*strange, pattern, None), expanded.forward(x, values, pattern, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="float64"):
        expanded.expand_active(values.double(), pattern)
    with pytest.raises(ValueError, match="not the layer's 30"):
        expanded.grad_values(x, x, pattern)

import pytest
import torch

from hf_topkast.ops import reference
from hf_topkast.storage import Pattern


def problem(shape, tokens=7, shares=(0.3, 0.6), dtype=torch.float64, seed=0, block_size=(1, 1)):
    generator = torch.Generator().manual_seed(seed)
    height, width = block_size
    draw = torch.rand(shape[0] // height, shape[1] // width, generator=generator)
    draw = draw.repeat_interleave(height, 0).repeat_interleave(width, 1)
    active, backward = draw < shares[0], draw < shares[1]
    theta = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    pattern = Pattern.from_masks(active, backward, block_size)
    x = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(tokens, shape[0], generator=generator, dtype=torch.float64).to(dtype)
    return theta, active, pattern, theta.flatten()[pattern.flat_index()], x, dy


SHAPES = [(1, 1), (3, 5), (17, 1), (1, 33), (64, 48), (172, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shares", [(0.3, 0.6), (0.0, 0.5), (0.4, 0.4), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_products_equal_the_dense_masked_ones(shape, shares, tokens):
    theta, active, pattern, values, x, dy = problem(shape, tokens, shares)
    alpha = theta * active
    bias = torch.randn(shape[0], dtype=theta.dtype)
    torch.testing.assert_close(reference.expand_active(values, pattern), alpha, rtol=0, atol=0)
    torch.testing.assert_close(reference.forward(x, values, pattern, bias), x @ alpha.T + bias)
    torch.testing.assert_close(reference.grad_input(dy, values, pattern), dy @ alpha)
    dense_gradient = (dy.T @ x).flatten()[pattern.flat_index()]
    torch.testing.assert_close(reference.grad_values(dy, x, pattern), dense_gradient)


@pytest.mark.parametrize("block_size", [(4, 1), (1, 3), (16, 16)])
def test_blocks(block_size):
    theta, active, pattern, values, x, dy = problem((48, 96), block_size=block_size)
    alpha = theta * active
    torch.testing.assert_close(reference.forward(x, values, pattern, None), x @ alpha.T)
    torch.testing.assert_close(reference.grad_input(dy, values, pattern), dy @ alpha)
    dense_gradient = (dy.T @ x).flatten()[pattern.flat_index()]
    torch.testing.assert_close(reference.grad_values(dy, x, pattern), dense_gradient)


def test_infinite_exploration_weight_stays_out_of_the_product():
    theta, active, pattern, values, x, _ = problem((6, 5))
    values[pattern.active :] = float("inf")
    torch.testing.assert_close(reference.forward(x, values, pattern, None), x @ (theta * active).T)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_gradient_does_not_depend_on_the_chunks(rows_per_chunk, block_size, monkeypatch):
    _, _, pattern, _, x, dy = problem((64, 48), block_size=block_size)
    whole = (dy.T @ x).flatten()[pattern.flat_index()]
    monkeypatch.setattr(reference, "MIN_CHUNK_ELEMENTS", rows_per_chunk * 48)
    monkeypatch.setattr(reference, "GRADIENT_CHUNK", 0.0)
    torch.testing.assert_close(reference.grad_values(dy, x, pattern), whole)


def test_no_dense_gradient_exists_at_once(monkeypatch):
    monkeypatch.setattr(reference, "MIN_CHUNK_ELEMENTS", 2**16)
    shape = (1024, 512)
    _, _, pattern, _, x, dy = problem(shape, tokens=4, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    with Watch():
        reference.grad_values(dy, x, pattern)
    assert 0 < largest < shape[0] * shape[1] * 0.7  # the gradient at B itself has 0.6 n


def test_chunks_cover_every_row_of_a_large_layer(monkeypatch):
    monkeypatch.setattr(reference, "MIN_CHUNK_ELEMENTS", 2**16)
    _, _, pattern, _, x, dy = problem((1000, 300), tokens=3, shares=(0.01, 0.02))
    assert reference.rows_per_chunk(pattern) < 1000
    torch.testing.assert_close(reference.grad_values(dy, x, pattern), (dy.T @ x).flatten()[pattern.flat_index()])

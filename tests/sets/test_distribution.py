import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_topkast.sets.distribution import DISTRIBUTIONS, apportion, erdos_renyi, global_threshold, uniform


SHAPES = [(24, 72), (24, 24), (96, 24), (3, 5)]


def no_magnitudes():
    raise AssertionError("only the global distribution looks at the weights")


def test_uniform_gives_each_layer_its_share():
    assert uniform(SHAPES, [0.2, 0.001], no_magnitudes) == [[346, 115, 461, 3], [2, 1, 2, 1]]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_erdos_renyi_is_in_proportion_and_exact(density):
    (sizes,) = erdos_renyi(SHAPES, [density], no_magnitudes)
    numbers = [rows * columns for rows, columns in SHAPES]
    assert sum(sizes) == max(len(SHAPES), round(density * sum(numbers)))
    assert all(1 <= size <= numel for size, numel in zip(sizes, numbers))
    scales = [size / (rows + columns) for size, (rows, columns), n in zip(sizes, SHAPES, numbers) if size < n]
    assert all(abs(scale - other) * 8 <= 2 for scale in scales for other in scales)  # one more or less at 8 = 3 + 5
    full = [n / (rows + columns) for size, (rows, columns), n in zip(sizes, SHAPES, numbers) if size == n]
    assert all(scale <= min(scales, default=1e9) + 1 for scale in full)  # only what had to be capped


@pytest.mark.parametrize("block_size", [(1, 4), (8, 1), (4, 4)])
def test_erdos_renyi_of_blocks_is_that_of_their_weights(block_size):
    shapes, (height, width) = [(64, 16), (16, 64), (48, 32)], block_size
    blocks = [(rows // height, columns // width) for rows, columns in shapes]
    (sizes,) = erdos_renyi(blocks, [0.3], no_magnitudes, block_size)
    (plain,) = erdos_renyi(shapes, [0.3], no_magnitudes)
    assert sum(sizes) == round(0.3 * sum(rows * columns for rows, columns in blocks))
    assert all(abs(size * height * width - single) <= height * width for size, single in zip(sizes, plain))


@given(data=st.data(), count=st.integers(1, 8))
def test_apportion_is_exact_and_within_its_limits(data, count):
    weights = data.draw(st.lists(st.integers(1, 10**4), min_size=count, max_size=count))
    limits = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    total = data.draw(st.integers(count, sum(limits)))
    shares = apportion(total, weights, limits)
    assert sum(shares) == total
    assert all(1 <= share <= limit for share, limit in zip(shares, limits))


def test_largest_remainder_gets_the_odd_one():
    assert apportion(10, [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert apportion(10, [3, 2, 2], [9, 9, 9]) == [4, 3, 3]
    assert apportion(10, [3, 2, 2], [2, 9, 9]) == [2, 4, 4]
    assert apportion(4, [1000, 1, 1], [9, 9, 9]) == [2, 1, 1]


def by_one_sort(magnitudes, density):
    """Layer sizes of the largest weights in one stable sort, after each layer's largest."""
    firsts = torch.cat([torch.arange(m.numel()) == m.flatten().argmax() for m in magnitudes])
    together = torch.cat([m.flatten().double() for m in magnitudes])
    order = torch.sort(torch.where(firsts, float("inf"), together), descending=True, stable=True).indices
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: max(len(magnitudes), round(density * len(order)))]] = True
    return [int(part.sum()) for part in chosen.split([m.numel() for m in magnitudes])]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    densities=st.lists(st.floats(0.001, 1), min_size=1, max_size=2),
    levels=st.sampled_from([1, 3, 10**4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_global_equals_one_sort_of_everything(seed, densities, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (1, 1), (4, 3), (2, 9)]
    magnitudes = [
        (torch.randint(0, levels, shape, generator=generator) / 7 * 10.0 ** (place - 2)).to(dtype)
        for place, shape in enumerate(shapes)
    ]
    copies = [magnitude.clone() for magnitude in magnitudes]
    sizes = global_threshold(shapes, densities, lambda: iter(magnitudes))
    assert sizes == [by_one_sort(magnitudes, density) for density in densities]
    assert all(torch.equal(magnitude, copy) for magnitude, copy in zip(magnitudes, copies))


def test_global_tells_doubles_apart_that_are_one_single():
    magnitudes = [
        torch.tensor([[1, 1 + 1e-12], [9, 9]], dtype=torch.float64),
        torch.tensor([[2, 1 + 2e-12], [9, 9]], dtype=torch.float64),
    ]
    shapes = [(2, 2), (2, 2)]
    # 9, 9, 9, 9, 2, 1 + 2e-12, 1 + 1e-12, 1
    assert global_threshold(shapes, [6 / 8, 7 / 8], lambda: iter(magnitudes)) == [[2, 4], [3, 4]]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sizes_grow_with_the_density(name):
    magnitudes = [torch.rand(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
    small, large = DISTRIBUTIONS[name](SHAPES, [0.2, 0.4], lambda: iter(magnitudes))
    assert all(first <= second for first, second in zip(small, large))

import pytest
import torch

from hf_topkast.ops import costs
from hf_topkast.storage import Pattern


def pattern_of(density, backward_density=None, block_size=(1, 1), shape=(64, 80)):
    def mask(share):
        filled = torch.zeros(shape, dtype=torch.bool)
        filled[: round(share * shape[0])] = True
        return filled

    return Pattern.from_masks(mask(density), mask(backward_density or density), block_size)


@pytest.fixture
def half(monkeypatch):
    """Crossovers at a density of 0.5 from 64 tokens on, for all products."""
    table = {key: tuple(0.5 if tokens >= 64 else 1.0 for tokens in costs.TOKENS) for key in costs.CROSSOVERS}
    monkeypatch.setattr(costs, "CROSSOVERS", table)


def test_the_table_is_complete():
    for product in ("forward", "grad_input", "grad_values"):
        for matrix_units in (False, True):
            row = costs.CROSSOVERS[product, matrix_units]
            assert len(row) == len(costs.TOKENS) and all(0 < density <= 1 for density in row)


@pytest.mark.parametrize("leading", [(64,), (2, 40)])
def test_density_decides(half, leading):
    x = torch.zeros(*leading, 80)
    assert costs.sparse_is_faster("forward", x, pattern_of(0.5))
    assert not costs.sparse_is_faster("forward", x, pattern_of(0.6))
    assert costs.sparse_is_faster("forward", x, pattern_of(0.4, 0.9))
    assert not costs.sparse_is_faster("grad_values", x, pattern_of(0.4, 0.9))


def test_few_tokens_have_their_own_limit(half):
    assert costs.sparse_is_faster("forward", torch.zeros(16, 80), pattern_of(0.9))
    assert costs.sparse_is_faster("forward", torch.zeros(0, 80), pattern_of(0.9))


def test_between_two_numbers_of_tokens_the_limit_lies_between_theirs():
    row = tuple(1 / (1 + place) for place in range(len(costs.TOKENS)))
    assert [costs.crossover(row, tokens) for tokens in (0, *costs.TOKENS, 10**6)] == [1, *row, row[-1]]
    assert costs.crossover(row, 2048) == pytest.approx((row[-2] + row[-1]) / 2)


def test_blocks_raise_the_limit_where_they_share_loads(half):
    x, sparse = torch.zeros(200, 80), pattern_of(0.625, block_size=(4, 1))
    assert costs.sparse_is_faster("forward", x, sparse)
    assert not costs.sparse_is_faster("grad_input", x, sparse)


def test_blocks_have_no_kernels_for_few_tokens():
    shared, apart = pattern_of(0.125, block_size=(4, 1)), pattern_of(0.125, block_size=(2, 2))
    for tokens, expected in ((3, (True, True)), (8, (False, False)), (40, (True, False)), (200, (True, True))):
        x = torch.zeros(tokens, 80)
        assert tuple(costs.sparse_is_faster("forward", x, pattern) for pattern in (shared, apart)) == expected
    assert not costs.sparse_is_faster("grad_values", torch.zeros(3, 80), shared)


def test_matrix_units_multiply_bfloat16_only(monkeypatch):
    monkeypatch.setattr(costs, "AMX", True)
    x = torch.zeros(4096, 80)
    assert costs.sparse_is_faster("forward", x, pattern_of(0.2))
    assert not costs.sparse_is_faster("forward", x.bfloat16(), pattern_of(0.2))

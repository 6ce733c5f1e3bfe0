import itertools

import pytest
import torch

from hf_topkast.ops import reference
from hf_topkast.ops.crossovers import DTYPES, PRODUCTS, TOKENS
from hf_topkast.ops.reference import expand_active
from hf_topkast.ops.timing import RandomLayer, interleaved, median_ratio


measuring = pytest.importorskip("hf_topkast.ops.measuring", exc_type=ImportError)


def test_crossover_lies_where_the_ratios_pass_one():
    grid = measuring.DENSITIES
    assert measuring.crossover(lambda density: 2.0) == 1
    assert measuring.crossover(lambda density: 0.9) == 0
    for low, high in itertools.pairwise(grid):
        ratios = {density: 1.5 if density <= low else 0.5 for density in grid}
        assert measuring.crossover(ratios.__getitem__) == pytest.approx((low + high) / 2)


def test_a_table_has_every_entry_and_tells_of_each():
    told = []
    table = measuring.measure_table([(8, 16)], rounds=1, found=lambda *entry: told.append(entry))
    assert len(told) == measuring.ENTRIES
    assert {dtype: tuple(rows) for dtype, rows in table.items()} == dict.fromkeys(DTYPES, PRODUCTS)
    for dtype, product, tokens, density in told:
        assert table[dtype][product][TOKENS.index(tokens)] == density and 0 <= density <= 1


def test_interleaved_pairs():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert median_ratio([2, 4, 30], [1, 1, 10]) == 3


@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_a_random_layer_has_its_densities_and_products(block_size):
    layer = RandomLayer((16, 24), 5, 0.25, 0.5, block_size=block_size)
    assert (layer.pattern.active, layer.pattern.stored) == (96, 192)
    alpha = expand_active(layer.values, layer.pattern)
    products = layer.products(reference)
    torch.testing.assert_close(products["forward"](), layer.x @ alpha.T)
    torch.testing.assert_close(products["grad_input"](), layer.dy @ alpha)
    torch.testing.assert_close(products["grad_values"](), (layer.dy.T @ layer.x).flatten()[layer.pattern.flat_index()])
    for name, product in layer.chosen_products().items():  # of a backend that may round otherwise
        torch.testing.assert_close(product(), products[name](), rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(run().shape) for name, run in layer.dense_products().items()}
    assert shapes == {"forward": (5, 16), "grad_input": (5, 24), "grad_values": (16, 24)}

import json
import os
import subprocess
import sys

import pytest
import torch

from hf_topkast.ops import costs, measured
from hf_topkast.ops.crossovers import DTYPES, PRODUCTS
from hf_topkast.storage import Pattern


def pattern_of(density, backward_density=None, block_size=(1, 1), shape=(64, 80)):
    def mask(share):
        filled = torch.zeros(shape, dtype=torch.bool)
        filled[: round(share * shape[0])] = True
        return filled

    return Pattern.from_masks(mask(density), mask(backward_density or density), block_size)


def contents(kind, isa):
    """Of a file that was measured here: crossovers at a density of 0.25."""
    rows = dict.fromkeys(PRODUCTS, [0.25] * len(costs.TOKENS))
    return measured.contents(dict.fromkeys(DTYPES, rows), kind, isa)


def table_of(*rows):
    """A table with a row for each dtype, the same for all products."""
    return costs.Table({dtype: dict.fromkeys(PRODUCTS, row) for dtype, row in zip(DTYPES, rows)}, "the test's table")


@pytest.fixture
def half(monkeypatch):
    """Crossovers at a density of 0.5 from 64 tokens on, for all products."""
    row = tuple(0.5 if tokens >= 64 else 1.0 for tokens in costs.TOKENS)
    monkeypatch.setattr(costs, "TABLE", table_of(row, row))


@pytest.fixture
def said(monkeypatch):
    """What was said in the log, as often as it was handed over."""
    messages = []
    monkeypatch.setattr(costs.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize(
    ("isa", "amx", "kind"),
    [
        ("avx512", True, "amx"),
        ("avx512", False, "avx512"),
        ("avx2", False, "avx2"),
        ("avx2", True, "avx2"),  # by HF_TOPKAST_ISA
        ("portable", False, "avx2"),
    ],
)
def test_kinds_of_cpus(isa, amx, kind):
    assert costs.kind_of(isa, amx) == kind


def run(code, home):
    """Output and log of a new process with portable kernels, for the choice is made at import."""
    environment = os.environ | {"HF_TOPKAST_ISA": "portable", "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


def test_the_table_is_that_of_the_kernels_in_use(tmp_path):
    pytest.importorskip("hf_topkast.ops.cpu", exc_type=ImportError)
    script = """
import importlib, sys, torch
from hf_topkast.ops import costs, cpu
def show():
    importlib.reload(costs)
    assert costs.TABLE.crossovers is costs.CROSSOVERS[costs.KIND]
    print(costs.table_in_use())
show()
for cpu.isa, amx in (("avx512", True), ("avx512", False), ("avx2", False)):
    torch.cpu._is_amx_tile_supported = lambda: amx
    show()
sys.modules["hf_topkast.ops.cpu"] = None  # as if it were not built: an import of it fails
show()
"""
    kinds = "avx2", "amx", "avx512", "avx2", "avx2"
    assert run(script, tmp_path)[0] == [f"the built-in table for {kind}" for kind in kinds]


def test_a_file_in_the_cache_is_used_from_the_next_import_on_and_said_once(tmp_path):
    pytest.importorskip("hf_topkast.ops.cpu", exc_type=ImportError)
    script = """
import importlib, torch, hf_topkast
from hf_topkast.ops import costs, measured
layer = hf_topkast.sparsify(torch.nn.Sequential(torch.nn.Linear(4, 4)), density=0.5, target_modules=["0"])
def show():
    for _ in range(2):
        layer(torch.ones(2, 4)).sum().backward()
    print(costs.table_in_use())
show()
for text in ("{", None):
    measured.PATH.write_text(text) if text else measured.PATH.unlink()
    show()
    importlib.reload(costs)
    show()
"""
    path = tmp_path / "hf_topkast" / "crossover.json"
    path.parent.mkdir()
    path.write_text(json.dumps(contents("avx2", "portable")))
    used, log = run(script, tmp_path)
    assert used[0].startswith(f"{path}, measured on this machine")
    assert used == [used[0]] * 2 + ["the built-in table for avx2"] * 3
    assert log.count(used[0]) == 1 and log.count("Delete the file") == 1


def test_a_measured_table_is_used_until_its_file_is_deleted(tmp_path, monkeypatch, said):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps(contents("avx2", "avx2")))
    monkeypatch.setattr(costs, "TABLE", costs.choose("avx2", "avx2", path))
    assert str(path) in costs.table_in_use() and "measured on this machine" in costs.table_in_use()
    for density, expected in ((0.25, True), (0.375, False)):
        assert costs.sparse_is_faster("forward", torch.zeros(64, 80), pattern_of(density)) is expected
    assert set(said) == {costs.TABLE.notice} and str(path) in said[0]
    path.unlink()
    monkeypatch.setattr(costs, "TABLE", costs.choose("avx2", "avx2", path))
    said.clear()
    costs.sparse_is_faster("forward", torch.zeros(64, 80), pattern_of(0.25))
    assert costs.table_in_use() == "the built-in table for avx2" and not said


@pytest.mark.parametrize("isa", ["another", None])
def test_a_file_that_does_not_count_is_said_and_not_used(tmp_path, monkeypatch, said, isa):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps(contents("avx2", isa)) if isa else "{")
    monkeypatch.setattr(costs, "TABLE", costs.choose("avx2", "avx2", path))
    assert costs.TABLE.crossovers is costs.CROSSOVERS["avx2"]
    assert costs.table_in_use() == "the built-in table for avx2"
    costs.sparse_is_faster("forward", torch.zeros(64, 80), pattern_of(0.25))
    assert len(said) == 1 and str(path) in said[0] and "Delete" in said[0] and "hf-topkast calibrate" in said[0]


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


def test_slow_dense_products_of_blocks_are_avoided(half, monkeypatch):
    for kind, expected in (("avx2", True), ("avx512", False), ("amx", False)):
        monkeypatch.setattr(costs, "KIND", kind)
        x, blocks = torch.zeros(8, 80), pattern_of(0.125, block_size=(2, 2))
        assert costs.sparse_is_faster("grad_input", x.bfloat16(), blocks) is expected
        assert not costs.sparse_is_faster("grad_input", x, blocks)
        assert not costs.sparse_is_faster("grad_input", x[:3].bfloat16(), blocks)


def test_dtypes_have_their_own_limits(monkeypatch):
    monkeypatch.setattr(costs, "TABLE", table_of((0.5,) * len(costs.TOKENS), (0.1,) * len(costs.TOKENS)))
    x = torch.zeros(4096, 80)
    assert costs.sparse_is_faster("forward", x, pattern_of(0.2))
    assert not costs.sparse_is_faster("forward", x.bfloat16(), pattern_of(0.2))

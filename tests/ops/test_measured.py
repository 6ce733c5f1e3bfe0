import json
import math

import pytest
import torch

from hf_topkast.ops import measured
from hf_topkast.ops.crossovers import CROSSOVERS, DTYPES, PRODUCTS, TOKENS


HERE = "avx512", "avx512"  # kind and instruction set
ROW = [round(0.1 + 0.05 * place, 2) for place in range(len(TOKENS))]


def contents():
    return measured.contents({dtype: {product: list(ROW) for product in PRODUCTS} for dtype in DTYPES}, *HERE)


@pytest.fixture
def write(tmp_path):
    """Writes a file of these contents, or of this text."""

    def written(content):
        path = tmp_path / "crossover.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def test_every_built_in_table_is_complete():
    assert list(CROSSOVERS) == ["amx", "avx512", "avx2"]
    for table in CROSSOVERS.values():
        assert {dtype: tuple(table[dtype]) for dtype in table} == dict.fromkeys(DTYPES, PRODUCTS)
        for row in (row for rows in table.values() for row in rows.values()):
            assert len(row) == len(TOKENS) and all(0 <= density <= 1 for density in row)


def test_a_file_gives_back_its_table_and_says_where_it_is_from(write):
    crossovers, origin = measured.read(write(contents()), *HERE)
    assert crossovers == {dtype: dict.fromkeys(PRODUCTS, tuple(ROW)) for dtype in DTYPES}
    assert f"{torch.get_num_threads()} threads" in origin and torch.__version__ in origin


def test_no_file(tmp_path):
    assert measured.read(tmp_path / "crossover.json", *HERE) is None
    assert measured.read(tmp_path / "folder" / "crossover.json", *HERE) is None
    (tmp_path / "folder").touch()
    assert measured.read(tmp_path / "folder" / "crossover.json", *HERE) is None


@pytest.mark.parametrize("field", ["cpu", "kind", "isa"])
def test_a_file_of_another_machine_is_refused(write, field):
    path = write(contents() | {field: "another"})
    with pytest.raises(ValueError, match=r"crossover.json was measured on.*another.*Delete.*hf-topkast calibrate"):
        measured.read(path, *HERE)


def damaged():
    """Files that are none, by what is wrong with them."""

    def row(densities):
        content = contents()
        content["crossovers"]["bfloat16"]["grad_input"] = densities
        return content

    whole = json.dumps(contents())
    yield from {"empty": "", "cut off": whole[: len(whole) // 2], "a list": "[]", "a number": "1"}.items()
    for field in contents():
        yield f"without {field}", {name: value for name, value in contents().items() if name != field}
    for value in (math.nan, math.inf, -0.1, 1.1, "0.5", None, True, [0.5]):
        yield f"a density of {value}", row([*ROW[1:], value])
    rows = {"short": ROW[1:], "long": [*ROW, 0.5], "text": "012345678", "a number": 0.5, "null": None, "an object": {}}
    yield from ((f"a row that is {name}", row(densities)) for name, densities in rows.items())
    yield "other tokens", contents() | {"tokens": [*TOKENS[:-1], 8192]}
    yield "without a dtype", contents() | {"crossovers": {"float32": contents()["crossovers"]["float32"]}}
    yield "a table that is none", contents() | {"crossovers": "float32"}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in damaged()])
def test_a_damaged_file_is_refused(write, content):
    with pytest.raises(ValueError, match=r"crossover.json holds no table.*Delete.*hf-topkast calibrate"):
        measured.read(write(content), *HERE)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*Delete"):
        measured.read(tmp_path, *HERE)  # a folder
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read.*Delete"):
        measured.read(tmp_path / "bytes", *HERE)


def test_the_processor_has_a_name():
    assert measured.processor() == measured.processor() != ""

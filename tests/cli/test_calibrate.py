import pytest

from hf_topkast.ops import BACKENDS, costs, measured


pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.skipif("cpu" not in BACKENDS, reason="installed without kernels"),
]
TINY = ("--shape", "8x16", "--shape", "16x8", "--rounds", "1", "--threads", "1")


@pytest.fixture
def place(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "hf_topkast" / "crossover.json"
    monkeypatch.setattr(measured, "PATH", path)
    return path


def test_a_table_is_written_and_then_used(place, run_json):
    told = run_json("calibrate", *TINY)
    assert [file.name for file in place.parent.iterdir()] == [place.name] and told["file"] == str(place)
    table = costs.choose(costs.KIND, BACKENDS["cpu"].isa, place)
    assert str(place) in table.origin and "1 threads" in table.origin
    assert {dtype: {key: tuple(row) for key, row in rows.items()} for dtype, rows in told["crossovers"].items()} == (
        table.crossovers
    )


def test_a_dry_run_writes_nothing(place, run):
    printed = run("calibrate", *TINY, "--dry-run")
    assert "not written" in printed and "grad_values" in printed and not place.parent.exists()


def test_bad_input(place, refused):
    assert "OUTxIN" in refused("calibrate", "--shape", "8")
    assert "rounds" in refused("calibrate", "--rounds", "0")
    assert not place.parent.exists()

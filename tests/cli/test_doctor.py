import pytest
import torch

from hf_topkast import ops
from hf_topkast.cli import doctor


pytestmark = pytest.mark.usefixtures("threads")


def test_doctor(run_json, run, monkeypatch):
    found = run_json("doctor", "--seconds", "0")
    assert found["versions"]["torch"] and found["backends"]["reference"]["runs"]
    assert found["backends"]["cpu"]["runs"] == ("cpu" in ops.BACKENDS)
    assert found["table"] and "measured" not in found
    monkeypatch.setattr(doctor, "SHAPES", ((8, 16), (16, 8), (8, 8)))
    measured = run_json("doctor", "--seconds", "0.01")["measured"]
    assert [row["shape"] for row in measured] == [[8, 16], [16, 8], [8, 8]]
    assert all(row["dense_over_sparse"] > 0 and len(row["backends"]) == 3 for row in measured)
    printed = run("doctor", "--seconds", "0.01")
    assert "sparse or dense products" in printed and "8×16" in printed


def test_why_not(monkeypatch, run_json):
    monkeypatch.setattr(ops, "BACKENDS", {"reference": ops.reference})
    monkeypatch.setattr(ops, "WHY_NO_CPU", "no compiler")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = run_json("doctor", "--seconds", "0")
    assert not found["backends"]["cpu"]["runs"] and "no compiler" in found["backends"]["cpu"]["why"]
    assert found["backends"]["triton"]["why"] == "torch sees no GPU"  # which Triton would not help
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "hf-topkast[gpu]" in doctor.backends()["triton"]["why"]
    assert any("install a C++17 compiler" in warning for warning in found["warnings"])
    assert any("one thread" in warning for warning in found["warnings"])


def test_an_old_torch(monkeypatch, run_json):
    monkeypatch.setattr(doctor, "_version", lambda name: "2.4.0+cpu" if name == "torch" else None)
    assert any(
        "torch 2.4.0+cpu is older than 2.11" in each for each in run_json("doctor", "--seconds", "0")["warnings"]
    )


def test_bad_input(refused):
    assert "seconds" in refused("doctor", "--seconds", "long")

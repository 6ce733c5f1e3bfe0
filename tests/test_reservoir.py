import sys
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast.pattern import Pattern
from hf_topkast.reservoir import assemble_theta, put_to_rest, take_reservoir


@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 10**6))
def test_theta_comes_back_bit_by_bit(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    theta, draw = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    active, backward = draw < 0.2, draw < 0.5
    pattern = Pattern.from_masks(active, backward)
    values, reservoir = theta.flatten()[pattern.flat_index()], take_reservoir(theta, backward)
    assert values.numel() + reservoir.numel() == theta.numel()
    assert torch.equal(assemble_theta(values, pattern, reservoir), theta)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_put_to_rest_copies(place, numel):
    numbers = torch.randn(numel)
    resting = put_to_rest(numbers, place)
    assert torch.equal(resting, numbers)
    resting += 1
    assert not torch.equal(resting, numbers) or numel == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_disk_uses_a_file_and_leaves_none_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    resting = put_to_rest(torch.ones(5000), "disk")
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) in maps.read()
    assert list(tmp_path.iterdir()) == []
    assert resting.sum() == 5000

import contextlib
import copy
import pickle
import sys
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast import sparsify
from hf_topkast.storage import Pattern
from hf_topkast.storage.reservoir import Arriving, assemble_theta, put_to_rest, take_reservoir


@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 10**6))
def test_theta_comes_back_bit_by_bit(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    theta, draw = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    active, backward = draw < 0.2, draw < 0.5
    pattern = Pattern.from_masks(active, backward)
    values, reservoir = theta.flatten()[pattern.flat_index()], take_reservoir(theta, backward, "same")
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_rests_on_disk_too(tmp_path, monkeypatch, duplicate):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), target_modules=["0"], reservoir_device="disk")

    def files():
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line for line in maps)

    assert files() == 1
    twin = duplicate(model[0])
    assert files() == 2
    assert torch.equal(twin.reservoir, model[0].reservoir)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_on_the_host_a_reservoir_has_arrived(place):
    resting = put_to_rest(torch.randn(10), place)
    assert Arriving(resting, torch.device("cpu")).here() is resting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_reservoir_arrives_at_a_gpu(place):
    numbers = torch.randn(10**6)
    arriving = [Arriving(put_to_rest(numbers + shift, place), torch.device("cuda")) for shift in range(4)]
    for shift, each in enumerate(arriving):
        assert torch.equal(each.here().cpu(), numbers + shift)


class OnTheHost:
    """As a pinned tensor, with notes of what is done to its copy."""

    device = torch.device("cpu")

    def __init__(self, notes):
        self.notes = notes

    def to(self, device, non_blocking):
        assert non_blocking
        self.notes.append("copy")
        copy = OnTheHost(self.notes)
        copy.device = device
        return copy

    def record_stream(self, stream):
        self.notes.append(f"kept for {stream.name}")


class Stream:
    """As a stream of a GPU."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def record_event(self):
        self.notes.append(f"event of {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


def test_a_copy_to_a_gpu_is_waited_for_and_kept(monkeypatch):
    notes, entered = [], []
    monkeypatch.setattr("hf_topkast.storage.reservoir._copying_stream", lambda device: Stream("side", notes))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", notes))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream.name) or contextlib.nullcontext())
    arriving = Arriving(OnTheHost(notes), torch.device("cuda"))
    assert notes == ["copy", "event of side"] and entered == ["side"]
    assert arriving.here().device.type == "cuda"
    assert notes[2:] == ["main waits for event of side", "kept for main"]

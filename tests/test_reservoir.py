import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast.pattern import Pattern
from hf_topkast.reservoir import assemble_theta, take_reservoir


@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 10**6))
def test_theta_comes_back_bit_by_bit(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    theta, draw = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    active, backward = draw < 0.2, draw < 0.5
    pattern = Pattern.from_masks(active, backward)
    values, reservoir = theta.flatten()[pattern.flat_index()], take_reservoir(theta, backward)
    assert values.numel() + reservoir.numel() == theta.numel()
    assert torch.equal(assemble_theta(values, pattern, reservoir), theta)

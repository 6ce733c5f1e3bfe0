"""What a layer says of a state that is not its own."""

import pytest
import torch
from torch import nn

from hf_topkast import sparsify


def make(block_size=1, size=8, out=8, **settings):
    model = nn.Sequential(nn.Linear(size, out))
    return sparsify(model, density=0.25, target_modules=["0"], block_size=block_size, **settings)


@pytest.mark.parametrize("block_size", [(2, 1), (1, 2), (4, 4)])
def test_another_block_size_is_named(block_size):
    for one, other in ((1, block_size), (block_size, 1)):
        with pytest.raises(RuntimeError, match="Layer '0'.*another block_size than"):
            make(one).load_state_dict(make(other).state_dict())


def test_another_order_of_blocks_is_named():
    plain, scattered = make(4), make(4, scatter_blocks=True)
    for one, other in ((plain, scattered), (scattered, plain)):
        theta = one[0].theta()
        with pytest.raises(RuntimeError, match="Layer '0'.*another scatter_blocks"):
            one.load_state_dict(other.state_dict())
        assert torch.equal(one[0].theta(), theta)
    scattered.load_state_dict(make(4, scatter_blocks=True).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_order_of_blocks_is_named_after_rounding(dtype):
    for size in (128, 768):
        plain, scattered = (make(16, size, out=size, scatter_blocks=scatter) for scatter in (False, True))
        for one, other in ((plain, scattered), (scattered, plain), (scattered, scattered)):
            state = other.state_dict()
            state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
            if one is other:
                one.load_state_dict(state)
                continue
            with pytest.raises(RuntimeError, match="Layer '0'.*another scatter_blocks"):
                one.load_state_dict(state)


def test_a_state_without_a_digest_is_none_of_scattered_blocks():
    state = {key: value for key, value in make(4).state_dict().items() if not key.endswith("sets_digest")}
    make(4).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Layer '0'.*no sets_digest.*scatter_blocks"):
        make(4, scatter_blocks=True).load_state_dict(state)


def test_other_numbers_of_weights_are_named():
    with pytest.raises(RuntimeError, match="Layer '0': .*32 values and 96 reservoir weights.*a layer of 64 weights"):
        make().load_state_dict({**make().state_dict(), **make(size=16, backward_density=0.25).state_dict()})
    with pytest.raises(RuntimeError, match="Layer '0': .*not a layer of 64 weights that keeps no weights outside B"):
        make(method="rigl").load_state_dict(make().state_dict())


def test_offsets_of_other_columns_are_named():
    state = make().state_dict()
    state["0.row_offsets"] = state["0.row_offsets"].clamp(max=3)
    del state["0.sets_digest"]
    with pytest.raises(RuntimeError, match="Layer '0': the state's row_offsets end at 3, but it holds 32 columns"):
        make().load_state_dict(state)


@pytest.mark.parametrize("settings", [{"method": "rigl"}, {"backward_density": 1.0}])
def test_a_reservoir_that_has_nothing_may_be_missing(settings):
    one, other = make(**settings), make(**settings)
    other[0].values.data.mul_(2)
    state = {key: value for key, value in other.state_dict().items() if not key.endswith("reservoir")}
    one.load_state_dict(state)
    assert torch.equal(one[0].theta(), other[0].theta())
    with pytest.raises(RuntimeError, match="Missing key.*reservoir"):
        make().load_state_dict({key: value for key, value in make().state_dict().items() if "reservoir" not in key})

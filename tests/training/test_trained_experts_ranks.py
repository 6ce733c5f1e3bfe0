"""Sparse experts on two ranks, of which one has tokens for few of them: where one process gets."""

import pytest
import torch
from rank_loops import whole
from rank_workers import expert_batches, expert_model
from ranks import launch
from toy_models import loss_of

from hf_topkast import TopKastController


COMMON = {"density": 0.3, "refresh_every": 2, "penalty": 1e-3}
CONFIGS = {
    "topkast": COMMON,
    "resized": {**COMMON, "initial_density": 0.6, "schedule_begin": 0, "schedule_end": 4, "distribution": "global"},
    "explored": {**COMMON, "explore_until": 4, "split_fused": True},
    "blocks": {**COMMON, "block_size": [2, 4], "scatter_blocks": True, "reservoir_device": "cpu"},
    "rigl": {**COMMON, "method": "rigl", "drop_share": 0.3},
    "mest": {**COMMON, "method": "mest"},
    "scored": {**COMMON, "score": "activation"},
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "sharded"),
    [("mixtral", False), *(pytest.param(*case, marks=SLOW) for case in (("mixtral", True), ("gpt_oss", True)))],
)
def test_two_ranks_equal_one_process(family, sharded, tmp_path):
    launch("experts_by_methods", directory=str(tmp_path), family=family, configs=CONFIGS, sharded=sharded)
    for name, config in CONFIGS.items():
        model = expert_model(family, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        TopKastController(model, optimizer, total_steps=6)
        for tokens in expert_batches():
            for half in tokens.chunk(2):
                (loss_of(model, half) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = whole(model)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            idle = found.pop("idle")
            assert rank == 0 or bool((idle > 0).all())  # whose experts DDP must not wait for
            assert found.keys() == expected.keys()
            for key, number in found.items():
                if key.endswith(".sets"):
                    assert torch.equal(number, expected[key]), (name, key)
                else:
                    torch.testing.assert_close(number, expected[key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")

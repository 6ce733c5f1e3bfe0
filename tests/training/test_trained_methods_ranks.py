"""Every method in several processes: equal sets on all, and what one process does with the whole batch."""

import pytest
import torch
from rank_workers import whole
from ranks import launch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify


COMMON = {"density": 0.2, "refresh_every": 2, "penalty": 1e-3}
SCHEDULE = {"schedule_begin": 2, "schedule_end": 7}
EXCHANGE = {"set": {}, "rigl": {}, "gse": {}, "mest": {"drop_share": 0.4}, "smet": {"new_state_warmup": 3}}
OTHERS = {"topkast_random": {}, "static": {}, "static_random": {}, "magnitude_pruning": SCHEDULE, "dpf": SCHEDULE}


def alone(config):
    """What one process has after a training on all of the batches."""
    model = sparsify(make_gpt2(dtype=torch.float64), **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = whole(model)
    TopKastController(model, optimizer, total_steps=8)
    for tokens in token_batches(8):
        loss_of(model, tokens[:2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, whole(model)


@pytest.mark.parametrize(
    ("engine", "methods"),
    [
        ("ddp", EXCHANGE),
        pytest.param("ddp", OTHERS, marks=pytest.mark.slow),
        pytest.param("fsdp", EXCHANGE, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_process(engine, methods, tmp_path):
    configs = {method: {"method": method, **COMMON, **settings} for method, settings in methods.items()}
    launch("by_methods", directory=str(tmp_path), configs=configs, sharded=engine == "fsdp")
    for method, config in configs.items():
        one, two = (torch.load(tmp_path / f"{method}-{rank}.pt") for rank in range(2))
        first, expected = alone(config)
        assert one.keys() == two.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(one[name], two[name]), (method, name)
            torch.testing.assert_close(one[name], tensor, rtol=1e-10, atol=1e-10)
            if name.endswith(".sets"):
                assert torch.equal(one[name], tensor), (method, name)
                assert torch.equal(tensor, first[name]) == method.startswith("static"), (method, name)

"""Every method in several processes: equal sets on all, and what one process does with the whole batch."""

import pytest
import torch
from rank_loops import whole
from ranks import launch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify


COMMON = {"density": 0.2, "refresh_every": 2, "penalty": 1e-3}
SCHEDULE = {"schedule_begin": 2, "schedule_end": 7}
EXCHANGE = {"set": {}, "rigl": {}, "gse": {}, "mest": {"drop_share": 0.4}, "smet": {"new_state_warmup": 3}}
OTHERS = {"topkast_random": {}, "static": {}, "static_random": {}, "magnitude_pruning": SCHEDULE, "dpf": SCHEDULE}


SCORED = {
    "by row": {"score": "activation", "compare": "row"},
    "by layer": {"score": "activation", "compare": "layer", "exploration_lr_scale": 0.3},
    "dpf": {"method": "dpf", "score": "activation", **SCHEDULE},
    "scattered": {"score": "activation", "block_size": [4, 8], "scatter_blocks": True},
}


def alone(config, micro_batches):
    """What one process has after a training on all of the batches, without steps that were given up."""
    calibration = token_batches(2, seed=5) if config.get("score") == "activation" else None
    model = sparsify(make_gpt2(dtype=torch.float64), **config, calibration=calibration)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = whole(model)
    TopKastController(model, optimizer, total_steps=8)
    batches = token_batches(8 * micro_batches)
    for number, tokens in enumerate(batches, start=1):
        (loss_of(model, tokens[:2]) / micro_batches).backward()
        if number % micro_batches == 0:
            optimizer.step()
            optimizer.zero_grad()
    return first, whole(model)


def check_ranks(directory, engine, configs, **way):
    """Whether two ranks have the same in the end, and what one process has; yields that, with the first state."""
    launch("by_methods", directory=str(directory), configs=configs, sharded=engine == "fsdp", **way)
    for name, config in configs.items():
        one, two = (torch.load(directory / f"{name}-{rank}.pt") for rank in range(2))
        first, expected = alone(config, way.get("micro_batches", 1))
        assert one.keys() == two.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(one[key], two[key]), (name, key)
            torch.testing.assert_close(one[key], tensor, rtol=1e-10, atol=1e-10)
            if key.endswith(".sets"):
                assert torch.equal(one[key], tensor), (name, key)
        yield name, first, expected


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
    for method, first, last in check_ranks(tmp_path, engine, configs):
        for name in (name for name in last if name.endswith(".sets")):
            assert torch.equal(last[name], first[name]) == method.startswith("static"), (method, name)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_norms_of_inputs_are_those_of_the_data_of_all_ranks(engine, tmp_path):
    configs = {name: {**COMMON, **settings} for name, settings in SCORED.items()}
    for _, first, last in check_ranks(tmp_path, engine, configs, micro_batches=2):
        names = [name for name in last if name.endswith(".input_norms")]
        assert len(names) == 8
        assert all(((last[name] - first[name]).abs() > 1e-4 * first[name]).any() for name in names)


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_gradients_are_those_of_all_micro_batches_of_their_step(engine, tmp_path):
    configs = {"rigl": {"method": "rigl", **COMMON, "drop_share": 0.5, "update_until": 8}}
    for _, first, last in check_ranks(tmp_path, engine, configs, micro_batches=2, skips=True):
        assert not any(torch.equal(last[name], first[name]) for name in last if name.endswith(".sets"))

import json

import pytest
import torch
from rank_loops import RESIZING, sgd, whole
from ranks import launch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.storage.distributed import SHARDS_INTEGERS
from hf_topkast.surgery import sparse_layers


def outcome(directory, ranks, engine="ddp", samples=8, **arguments):
    """θ, sets and dense weights after a training whose steps take `samples` samples, however many ranks there are."""
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 12, **arguments}
    size = samples // ranks // arguments["gradient_accumulation_steps"]
    launch("train", ranks, engine, directory=str(directory), per_device_train_batch_size=size, **arguments)
    state = torch.load(directory / "report.pt")
    assert state.pop("ranks") == ranks
    return state


def check_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        if key.endswith(".sets"):
            assert torch.equal(one[key], other[key]), key
        elif key == "metrics":
            torch.testing.assert_close(one[key], other[key], rtol=1e-2, atol=0)
        else:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(one_process, tmp_path, engine):
    check_same(one_process, outcome(tmp_path, 2, engine))


@pytest.mark.slow
def test_a_decoupled_penalty_under_fsdp(tmp_path):
    config = {"penalty_mode": "decoupled", "penalty": 2.0}
    one_process = outcome(tmp_path / "one", 1, config=config)
    check_same(one_process, outcome(tmp_path / "two", 2, "fsdp", config=config))


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """Where two ranks wrote what they found in plain loops under DDP."""
    directory = tmp_path_factory.mktemp("loops")
    launch("plain_loops", directory=str(directory))
    return directory


@pytest.fixture
def facts(loops):
    return [json.loads((loops / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", RESIZING)
def test_bytes_sent_are_those_of_the_stored_numbers(facts, how):
    for rank in facts:
        steps = rank["steps"][how]
        assert len(steps) == 6
        for step in steps:
            assert step["sent"] == pytest.approx(step["trained"], rel=0.01)
        if how == "explored":
            assert steps[3]["sent"] < 0.7 * steps[2]["sent"]
        if how == "scheduled":
            assert steps[4]["sent"] < 0.9 * steps[2]["sent"] < 0.9 * steps[1]["sent"]


@pytest.mark.parametrize("how", RESIZING)
def test_sizes_change_under_ddp(loops, how):
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2, **RESIZING[how])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    TopKastController(model, optimizer)
    for tokens in token_batches(6):  # the first two thirds went to one rank each, the last one to both
        optimizer.zero_grad()
        for part, share in zip(tokens.chunk(3), (1 / 4, 1 / 4, 1 / 2)):
            (share * loss_of(model, part)).backward()
        optimizer.step()
    check_same(whole(model), torch.load(loops / f"{how}.pt"))


@pytest.mark.parametrize("how", RESIZING)
def test_a_checkpoint_of_other_sizes_than_the_wrappers(facts, how):
    for rank in facts:
        assert rank["resumed"][how] == {"from uninterrupted": 0, "between ranks": 0}


@pytest.mark.parametrize("how", ["unwrapped", "unwrapped, by hand", "unwrapped, other settings"])
def test_sizes_that_a_wrapper_cannot_follow_are_refused(facts, how):
    assert all("Give TopKastController the wrapped model" in rank[how] for rank in facts)


def test_wrappers_that_cannot_follow_are_refused(facts):
    for rank in facts:
        assert "only in the default process group and without static_graph" in rank["static graph"]
        assert "since DDP laid out its gradient buckets" in rank["loaded last"]


def test_uneven_inputs_are_refused(facts):
    assert all("DDP's join() lets ranks take different numbers of steps" in rank["join"] for rank in facts)


def test_gradients_are_compressed_as_before_when_sizes_change(facts):
    for rank in facts:
        for how in ("built in", "fp16"):
            assert all(halves and finite for halves, _, finite in rank["hooks"][how])
        assert all(low_rank and finite for _, low_rank, finite in rank["hooks"]["power"][2:])


@pytest.mark.parametrize("how", ["other sets", "other calibration", "drift"])
def test_other_sets_are_an_error_on_every_rank(facts, how):
    for rank in facts:
        assert "the sets A and B of rank 1 are not those of rank 0" in rank[how]
        assert ("transformer.h.0.mlp.c_fc" if how == "drift" else "transformer.h.0.attn.c_attn") in rank[how]


def test_one_ranks_error_is_raised_on_every_rank(facts):
    for rank, found in enumerate(facts):
        assert "Layer 'transformer.h.0.mlp.c_fc'" in found["nan"]
        assert found["nan"].startswith("Rank 1: ") == (rank == 0)


@pytest.mark.slow
def test_bytes_of_a_rank_under_fsdp(tmp_path):
    launch("fully_sharded", directory=str(tmp_path))
    config = sparsify(make_gpt2(), density=0.2)
    n = sum(layer.numel for _, layer in sparse_layers(config))
    rest = sum(parameter.numel() for name, parameter in config.named_parameters() if not name.endswith(".values"))
    for rank in range(2):
        found = json.loads((tmp_path / f"facts-{rank}.json").read_text())
        assert found["dense"] == pytest.approx(16 * (n + rest) / 2, rel=0.02)
        offsets = sum(4 * (2 * layer.matrix_shape[0] + 1) for _, layer in sparse_layers(config))  # whole on each rank
        columns = 2 * 0.4 * n / (2 if SHARDS_INTEGERS else 1)
        stored = (16 * 0.4 + 1 / 8) * n + 16 * rest
        assert found["sparse"] == pytest.approx((stored + 4 * 0.6 * n) / 2 + columns + offsets, rel=0.02)
        assert found["on disk"] == pytest.approx(stored / 2 + columns + offsets, rel=0.02)
        assert all(found["walks"])
        assert "FSDP2 has sharded" in found["refresh_lag"] and "Set refresh_lag=0" in found["refresh_lag"]


@pytest.mark.slow
def test_accelerates_fsdp_in_a_loop(tmp_path):
    launch("prepared_by_accelerate", engine="fsdp", directory=str(tmp_path))
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
    optimizer = sgd(model)
    TopKastController(model, optimizer)
    for tokens in token_batches(6):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
    check_same(whole(model), torch.load(tmp_path / "report.pt"))


def resumed(directory, engines, ranks, **settings):
    """The end of a training that started on one number of ranks and went on, from other weights, on another."""
    saving = {"save_strategy": "steps", "save_steps": 5, **settings}
    outcome(directory, ranks[0], engines[0], **saving)
    return outcome(directory, ranks[1], engines[1], resume=str(directory / "checkpoint-5"), weights=1, **saving)


@pytest.mark.slow
@pytest.mark.parametrize(("engines", "ranks"), [(("fsdp", "ddp"), (2, 1)), (("ddp", "fsdp"), (1, 2))])
def test_resume_on_another_number_of_ranks(one_process, tmp_path, engines, ranks):
    check_same(one_process, resumed(tmp_path, engines, ranks))


@pytest.mark.slow
def test_resume_from_sharded_checkpoints(one_process, tmp_path):
    check_same(one_process, resumed(tmp_path, ("fsdp-sharded", "fsdp-sharded"), (2, 2)))


@pytest.mark.slow
def test_ddp_until_exploration_has_ended_and_then_fsdp(tmp_path):
    config = {"explore_until": 4}
    whole_run = outcome(tmp_path / "one", 1, config=config)
    saving = {"save_strategy": "steps", "save_steps": 5, "config": config}
    outcome(tmp_path, 2, "ddp", **saving)
    resume = str(tmp_path / "checkpoint-5")
    check_same(whole_run, outcome(tmp_path, 2, "fsdp", resume=resume, weights=1, **saving))


@pytest.mark.slow
@pytest.mark.parametrize(("engines", "ranks"), [(("fsdp", "fsdp"), (2, 2)), (("fsdp", "ddp"), (2, 1))])
def test_a_density_schedule_under_fsdp_resumed_on_another_number_of_ranks(tmp_path, engines, ranks):
    config = {"initial_density": 0.8, "schedule_begin": 0, "schedule_end": 9, "explore_until": 11}
    whole_run = outcome(tmp_path / "one", 1, config=config)
    check_same(whole_run, resumed(tmp_path, engines, ranks, config=config))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_four_ranks_equal_one_process(one_process, tmp_path, engine):
    check_same(one_process, outcome(tmp_path, 4, engine))

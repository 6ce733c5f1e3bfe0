import pytest
import torch
from rank_loops import RESIZING, whole
from ranks import launch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify


CONFIGS = {name: config for name, config in RESIZING.items() if "refresh_lag" not in config}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    launch("sizes_change_sharded", directory=str(directory))
    return directory


def test_sharded_checkpoints_of_sizes_that_change_are_refused_before_training(tmp_path):
    launch("refused_by_trainer", engine="fsdp-sharded", directory=str(tmp_path), initial_density=1.0)
    for rank in range(2):
        assert "fsdp_state_dict_type to FULL_STATE_DICT" in (tmp_path / f"refusal-{rank}.txt").read_text()


def test_full_checkpoints_of_what_is_no_transformers_model_are_refused_before_training(tmp_path):
    launch("refused_by_trainer", engine="fsdp", directory=str(tmp_path), plain=True)
    for rank in range(2):
        assert "fsdp_state_dict_type to SHARDED_STATE_DICT" in (tmp_path / f"refusal-{rank}.txt").read_text()


@pytest.mark.parametrize("name", [*CONFIGS, "on disk"])
def test_sizes_that_change_under_fsdp_equal_one_process(sharded, name):
    config = CONFIGS["scheduled"] if name == "on disk" else CONFIGS[name]
    model = sparsify(make_gpt2(dtype=torch.float64), **{"density": 0.2, "refresh_every": 2, **config})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    TopKastController(model, optimizer)
    for tokens in token_batches(6):
        loss_of(model, tokens[:2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = whole(model)
    for rank in range(2):
        found = torch.load(sharded / f"{name}-{rank}.pt")
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if key.endswith(".sets"):
                assert torch.equal(tensor, found[key]), key
            else:
                torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-9)

"""Checkpoints in all forms, and a way to run a command."""

import json

import pytest
import torch
from toy_models import make_gpt2
from toy_training import trained

from hf_topkast import export_sparse
from hf_topkast.cli import main


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A sparse model after three steps, in a folder with its checkpoint in every form."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = trained(make_gpt2)
    model.save_pretrained(folder / "sparse")
    model.save_pretrained(folder / "sharded", max_shard_size="20kB")
    export_sparse(model, folder / "compact")
    trained(make_gpt2, seed=1).save_pretrained(folder / "other")
    dense = make_gpt2()
    with torch.no_grad():
        dense.transformer.h[0].mlp.c_fc.weight[0] = 0
    dense.save_pretrained(folder / "dense")
    return model, folder


@pytest.fixture
def run(capsys):
    """Runs a command; gives what it printed."""

    def run(*words):
        main([str(word) for word in words])
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_json(run):
    """Runs a command with `--json`; gives what it printed, parsed."""
    return lambda *words: json.loads(run(*words, "--json"))


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused in one line; gives the line."""

    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("hf-topkast: ")
        return captured.err

    return refused

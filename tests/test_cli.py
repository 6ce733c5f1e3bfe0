import json

import pytest
import torch
from toy_models import make_gpt2, token_batches
from toy_training import trained
from transformers import AutoModelForCausalLM

from hf_topkast.cli import main
from hf_topkast.surgery import sparse_layers


@pytest.fixture
def saved(tmp_path):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path / "sparse")
    return model, tmp_path


def test_inspect(saved, capsys):
    main(["inspect", str(saved[1] / "sparse")])
    assert "transformer.h.1.mlp.c_proj" in capsys.readouterr().out


def test_densify(saved):
    model, folder = saved
    main(["densify", str(folder / "sparse"), str(folder / "dense")])
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    tokens = token_batches(1)[0]
    assert not list(sparse_layers(dense))
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits)


def test_export(saved):
    model, folder = saved
    main(["export", str(folder / "sparse"), str(folder / "small")])
    small = AutoModelForCausalLM.from_pretrained(folder / "small")
    tokens = token_batches(1)[0]
    torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (folder / "small" / "model.safetensors").stat().st_size < 20_000


def test_plot(tmp_path):
    history = [{"step": 1, "topkast/mask_churn": 0.3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    main(["plot", str(tmp_path), "--output", str(tmp_path / "churn.png")])
    assert (tmp_path / "churn.png").stat().st_size > 1000


def test_bad_input_is_one_line(tmp_path, capsys):
    for words in (["inspect", str(tmp_path)], ["plot", str(tmp_path)], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err

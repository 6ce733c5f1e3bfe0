import copy
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toy_models import token_batches
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_topkast import densify, sparsify
from hf_topkast.surgery import sparse_layers


def test_densify(checkpoints, run_json, tmp_path):
    model, folder = checkpoints
    told = run_json("densify", folder / "sparse", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = token_batches(1)[0]
    assert not list(sparse_layers(dense))
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits)
    assert not list((tmp_path / "dense").glob("tokenizer*"))  # there was none, and none is made up
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())


def test_export(checkpoints, run, tmp_path):
    model, folder = checkpoints
    assert "wrote" in run("export", folder / "sparse", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokens = token_batches(1)[0]
    torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GPT2ForSequenceClassification, GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=48, pad_token_id=0)),
        (T5ForConditionalGeneration, T5Config(num_layers=1, d_model=24, d_ff=32, d_kv=8, num_heads=2, vocab_size=48)),
    ],
)
def test_the_model_keeps_its_class_and_head(run, tmp_path, kind, config):
    model = sparsify(kind(config).eval(), density=0.2)
    model.save_pretrained(tmp_path / "sparse")
    for verb in ("densify", "export"):
        run(verb, tmp_path / "sparse", tmp_path / verb)
        changed = kind.from_pretrained(tmp_path / verb)
        assert changed.config.architectures == [kind.__name__]
        weights = (densify(changed) if verb == "export" else changed).state_dict()
        expected = densify(copy.deepcopy(model)).state_dict()
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


def test_a_class_that_transformers_lacks_is_named(checkpoints, refused, tmp_path):
    shutil.copytree(checkpoints[1] / "sparse", tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    config.write_text(config.read_text().replace("GPT2LMHeadModel", "MyOwnModel"))
    assert "MyOwnModel, which transformers does not have" in refused("densify", tmp_path / "in", tmp_path / "out")


def test_the_tokenizer_comes_along(checkpoints, run, tmp_path):
    shutil.copytree(checkpoints[1] / "sparse", tmp_path / "in")
    letters = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "in")
    run("densify", tmp_path / "in", tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab() == {"a": 0, "b": 1}


def test_bad_input(checkpoints, refused, tmp_path):
    folder = checkpoints[1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for verb in ("densify", "export"):
        assert "exists already" in refused(verb, folder / "sparse", tmp_path / "full")
        assert "nowhere" in refused(verb, tmp_path / "nowhere", tmp_path / "out")
        assert "is dense already" in refused(verb, folder / "dense", tmp_path / "out")

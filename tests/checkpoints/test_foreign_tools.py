"""What other tools do with our checkpoints, and old checkpoints: each loads as what its weights compute."""

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import make_trainer, same_weights, trained
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_topkast import CheckpointError, TopKastConfig, densify, export_sparse, sparsify
from hf_topkast.checkpoints import STATE_NAME, load_checkpoint
from hf_topkast.checkpoints.saving import SETTINGS_NAME
from hf_topkast.checkpoints.state_file import digest
from hf_topkast.surgery import sparse_layers


TOKENS = token_batches(1)[0]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings of loading."""
    warnings = []
    monkeypatch.setattr("hf_topkast.checkpoints.loading.logger.warning", warnings.append)
    return warnings


def check_dense(directory, expected, said, **arguments):
    """The directory loads as a dense model of the expected logits, with a warning that says why and what to do."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, **arguments).eval()
    assert not list(sparse_layers(loaded))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if loaded.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(loaded(TOKENS).logits.float(), expected, **tolerance)
    assert len(said) == 1 and 'sparsify(model, density="nonzero")' in said[0] and "dense" in said[0]
    return loaded


def test_config_json_is_that_of_the_dense_model(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    sparsify(make_model(), density=0.2).save_pretrained(tmp_path / "sparse")
    export_sparse(sparsify(make_model(), density=0.2), tmp_path / "export")
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").save_pretrained(tmp_path / "again")
    dense = (tmp_path / "dense" / "config.json").read_text()
    for name in ("sparse", "export", "again"):
        assert (tmp_path / name / "config.json").read_text() == dense, name


FINE_TUNE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).train()
assert "hf_topkast" not in sys.modules
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.tensor(eval(sys.argv[3]))
for _ in range(3):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval().save_pretrained(sys.argv[2])
torch.save(model(tokens).logits.detach(), sys.argv[2] + "/logits.pt")
"""


@pytest.mark.parametrize(("make_model", "in_place"), [(make_gpt2, False), (make_llama, True)])
def test_fine_tuned_by_stock_transformers(make_model, tmp_path, said, in_place):
    """As a new directory it is dense without a word of ours; over the old one, whose state file stays, with one."""
    trained(make_model).save_pretrained(tmp_path / "sparse")
    target = tmp_path / ("sparse" if in_place else "tuned")
    command = [sys.executable, "-c", FINE_TUNE, str(tmp_path / "sparse"), str(target), str(TOKENS.tolist())]
    subprocess.run(command, check=True)
    expected = torch.load(target / "logits.pt")
    if in_place:
        check_dense(target, expected, said)
        return
    loaded = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not list(sparse_layers(loaded)) and not said


def change(directory, key_part, new):
    weights = load_file(directory / "model.safetensors")
    key = next(key for key in weights if key_part in key)
    weights[key] = new(weights[key])
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_changed_weight_of_a_is_seen_in_every_dtype(tmp_path, said, dtype):
    model = trained(make_llama)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not said
    change(tmp_path, "1.mlp.up_proj", lambda weight: torch.where(weight == weight.max(), 1.5 * weight, weight))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not list(sparse_layers(loaded)) and len(said) == 1 and "'model.layers.1.mlp.up_proj'" in said[0]
    with pytest.raises(CheckpointError, match="not saved together"):
        load_checkpoint(model, tmp_path)


def test_one_weight_outside_a_is_seen(tmp_path, said):
    trained(make_llama).save_pretrained(tmp_path)
    change(tmp_path, "0.mlp.up_proj", lambda weight: torch.where(weight == 0, 1e-3, weight))
    assert not list(sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path))) and len(said) == 1


def test_changed_norms_and_embeddings_are_taken(tmp_path, said):
    trained(make_llama).save_pretrained(tmp_path)
    change(tmp_path, "model.norm", lambda weight: weight + 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(sparse_layers(loaded)) and not said
    assert loaded.model.norm.weight.mean() > 1.5


def test_the_average_of_two_checkpoints(tmp_path, said):
    for seed, name in enumerate(("one", "two")):
        trained(make_gpt2, seed=seed).save_pretrained(tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    average = {key: (one[key] + two[key]) / 2 for key in one}
    save_file(average, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    loaded, key = AutoModelForCausalLM.from_pretrained(tmp_path / "one"), "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(loaded.state_dict()[key], average[key])
    assert len(said) == 1


def test_another_model_beside_the_state(tmp_path, said):
    trained(make_llama).save_pretrained(tmp_path)
    dense = make_gpt2().eval()
    dense.save_pretrained(tmp_path / "dense")
    for file in (tmp_path / "dense").iterdir():
        shutil.copy(file, tmp_path)
    check_dense(tmp_path, dense(TOKENS).logits, said)


def test_a_dense_model_saved_over_a_sparse_one_takes_our_files_away(tmp_path, said):
    model = trained(make_gpt2)
    for write in (lambda: model.save_pretrained(tmp_path), lambda: export_sparse(model, tmp_path)):
        write()
        assert (tmp_path / STATE_NAME).is_file() and (tmp_path / SETTINGS_NAME).is_file()
        make_gpt2().save_pretrained(tmp_path)
        assert not (tmp_path / STATE_NAME).exists() and not (tmp_path / SETTINGS_NAME).exists()
        assert not list(sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path))) and not said


def test_whole_weights_beside_an_exports_state(tmp_path, said):
    model = trained(make_llama)
    export_sparse(model, tmp_path)
    expected = model(TOKENS).logits
    densify(model).save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path)
    check_dense(tmp_path, expected, said)


def as_written_by_0_1_0(directory):
    """Format version 1: settings in config.json, one digest a layer."""
    path = directory / STATE_NAME
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    digests = {name: found["float32"] for name, found in json.loads(metadata["digests"]).items()}
    metadata |= {"format_version": "1", "digests": json.dumps(digests)}
    metadata["digest"] = digest(tensors, metadata)
    save_file(tensors, path, metadata)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = json.loads(metadata["config"])
    (directory / "config.json").write_text(json.dumps(config))
    (directory / SETTINGS_NAME).unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_0_1_0_load(make_model, tmp_path, said, dtype):
    model = trained(make_model)
    model.save_pretrained(tmp_path)
    as_written_by_0_1_0(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert same_weights(model.to(dtype), loaded) and not said
    assert not hasattr(loaded.config, "quantization_config")


def test_exports_of_0_1_0_load(tmp_path, said):
    model = trained(make_gpt2)
    export_sparse(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "topkast", "density": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    assert list(sparse_layers(loaded)) and not said


def test_a_key_of_0_1_0_that_others_have_kept(tmp_path, said):
    """A tool without our import kept the key, changed the weights, and knew of no state file."""
    model = make_gpt2().eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "topkast", "density": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = check_dense(tmp_path, model(TOKENS).logits, said)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_resuming_is_refused_where_the_weights_were_changed(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    change(tmp_path / "checkpoint-4", "c_fc.weight", lambda weight: 2 * weight)
    with pytest.raises(CheckpointError, match="not saved together"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_thread_that_saves_beside_training_writes_whole_checkpoints(tmp_path):
    model = sparsify(make_gpt2(), density=0.2, refresh_every=1)
    problems, done, saved = [], threading.Event(), []

    def save():
        while not done.is_set():
            try:
                model.save_pretrained(tmp_path)
            except CheckpointError as error:
                problems.append(error)
            else:
                saved.append(1)

    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    layers = [layer for _, layer in sparse_layers(model)]
    generator = torch.Generator().manual_seed(0)
    while len(saved) < 4:
        time.sleep(0.05)
        for layer in layers:
            scores = torch.rand(layer.matrix_shape, generator=generator).flatten().argsort().view(layer.matrix_shape)
            layer.reassign(scores < layer.numel // 5, scores < layer.numel // 2)
    done.set()
    for thread in threads:
        thread.join()
    assert all("got other sets while it was being saved" in str(error) for error in problems)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    theta = {name: layer.dense_weight() for name, layer in sparse_layers(model)}
    assert all(torch.equal(layer.dense_weight(), theta[name]) for name, layer in sparse_layers(loaded)) and theta


def test_a_state_dict_that_mixes_several_is_not_saved(tmp_path):
    one, two = (trained(make_gpt2, seed=seed) for seed in (0, 1))
    states = one.state_dict(), two.state_dict()
    floats = {k: (v + states[1][k]) / 2 if v.is_floating_point() else v for k, v in states[0].items()}
    for state in (floats, {key: (value + states[1][key]) / 2 for key, value in states[0].items()}):
        with pytest.raises(CheckpointError, match="average_models"):
            one.save_pretrained(tmp_path, state_dict=state)
    del states[0]["transformer.h.0.mlp.c_fc.columns"]
    with pytest.raises(CheckpointError, match=r"lacks 'transformer\.h\.0\.mlp\.c_fc\.columns'"):
        one.save_pretrained(tmp_path, state_dict=states[0])
    assert not list(tmp_path.iterdir())


def test_a_state_dict_of_parameters_and_buffers_is_saved(tmp_path):
    model = trained(make_gpt2)
    model.save_pretrained(tmp_path, state_dict={**dict(model.named_parameters()), **dict(model.named_buffers())})
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_half_precision_files_beside_those_of_full_precision(tmp_path, said):
    """`variant` puts other weights into the same directory, under the one state file."""
    model = trained(make_llama)
    model.save_pretrained(tmp_path)
    expected = model(TOKENS).logits
    model.half().save_pretrained(tmp_path, variant="fp16")
    check_dense(tmp_path, expected, said, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16")
    assert list(sparse_layers(half)) and same_weights(half, model)


def test_settings_given_for_a_sparse_checkpoint_are_said_to_be_left_out(tmp_path, said):
    trained(make_gpt2).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TopKastConfig(density=0.5))
    assert len(said) == 1 and "sparse already" in said[0]


@pytest.mark.parametrize("kind", [LlamaForCausalLM, AutoModelForCausalLM])
def test_adapters_bring_their_sparse_base(tmp_path, kind):
    model = trained(make_llama)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["up_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    try:
        loaded = kind.from_pretrained(tmp_path / "adapter")
    except ValueError as error:  # transformers asks for a PEFT that is not there
        pytest.skip(str(error))
    assert len(list(sparse_layers(loaded))) == 14

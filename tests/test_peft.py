"""PEFT: adapters beside the frozen weights of a sparse model."""

import copy

import peft
import pytest
import torch
import transformers
from packaging import version
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from ranks import launch
from safetensors.torch import load_file
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import CONFIG, make_trainer, same_weights
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_topkast import TopKastTrainer, densify, sparsify
from hf_topkast.surgery import sparse_layers


TARGETS = {make_gpt2: ["c_attn", "c_fc"], make_llama: ["q_proj", "up_proj"]}


@pytest.fixture(params=TARGETS, ids=lambda make_model: make_model.__name__)
def make_model(request):
    return request.param


def add_lora(model, make_model, own=False, **settings):
    """A model with an adapter: PEFT's wrapper around it, or only layers in it, as transformers' add_adapter does."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=TARGETS[make_model], fan_in_fan_out=make_model is make_gpt2, **settings)
    return inject_adapter_in_model(config, model) if own else get_peft_model(model, config)


def lora_trainer(base, make_model, own=False):
    """A trainer class that adds an adapter to the model it is given."""

    class LoraTrainer(base):
        def __init__(self, model, **kwargs):
            super().__init__(model=add_lora(model, make_model, own), **kwargs)

    return LoraTrainer


def trained(make_model):
    """A sparse model with an adapter that has been trained for some steps by a plain loop."""
    model = add_lora(sparsify(make_model(), copy.deepcopy(CONFIG)), make_model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for tokens in token_batches(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    return model(token_batches(1)[0]).logits


def test_only_the_adapter_is_trained(make_model):
    base = sparsify(make_model(), copy.deepcopy(CONFIG)).eval()
    model = trained(make_model)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not torch.allclose(logits(model), logits(base))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-5)
    assert same_weights(model.unload(), base)


def test_an_adapter_is_saved_and_loaded(make_model, tmp_path):
    model = trained(make_model)
    model.save_pretrained(tmp_path / "adapter")
    sparsify(make_model(), copy.deepcopy(CONFIG)).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), logits(model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(make_model, merge, safe):
    model = trained(make_model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="To merge an adapter call densify"):
        getattr(model, merge)(safe_merge=safe)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_merging_after_densify(make_model):
    model = trained(make_model)
    before = logits(model)
    merged = densify(model).merge_and_unload()
    assert not any(sparse_layers(merged))
    torch.testing.assert_close(logits(merged), before)


def test_an_initialisation_that_changes_the_weights_is_refused(make_model):
    with pytest.raises(RuntimeError, match="writes to the weight of a sparse layer"):
        add_lora(sparsify(make_model(), density=0.2), make_model, init_lora_weights="pissa")


def test_sparsify_comes_first(make_model):
    with pytest.raises(ValueError, match="Call sparsify first"):
        sparsify(add_lora(make_model(), make_model), density=0.2)


needs_add_adapter = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} adds adapters by itself with PEFT {MIN_PEFT_VERSION} or later",
)


@needs_add_adapter
def test_sparsify_comes_before_an_adapter_of_transformers_own(make_model):
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[make_model]))
    with pytest.raises(ValueError, match="Call sparsify first"):
        sparsify(model, density=0.2)


@needs_add_adapter
def test_an_adapter_of_transformers_own_is_saved_alone(make_model, tmp_path):
    model = sparsify(make_model(), density=0.2)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[make_model], fan_in_fan_out=make_model is make_gpt2))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("base", [TopKastTrainer, Trainer])
def test_trainers(make_model, tmp_path, base):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "kind": lora_trainer(base, make_model)}
    straight = make_trainer(tmp_path, make_model, **settings)
    before = {name: layer.theta() for name, layer in sparse_layers(straight.model)}
    straight.train()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    for name, layer in sparse_layers(straight.model):
        assert torch.equal(layer.theta(), before[name]), name
    resumed = make_trainer(tmp_path, make_model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(straight.model, resumed.model)


def test_both_trainers_train_an_adapter_alike_and_load_the_best(make_model, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "metric_for_best_model": "loss"}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    ends = []
    for base in (TopKastTrainer, Trainer):
        folder = tmp_path / base.__name__
        trainer = make_trainer(folder, make_model, kind=lora_trainer(base, make_model), **settings)
        trainer.train()
        best = folder / "checkpoint-3"  # the first, where a larger loss is better
        assert trainer.state.best_model_checkpoint == str(best)
        saved, loaded = load_file(best / "adapter_model.safetensors"), get_peft_model_state_dict(trainer.model)
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
        ends.append(load_file(folder / "checkpoint-6" / "adapter_model.safetensors"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_adalora_trains_as_on_the_densified_model():
    """It freezes the layer by its weight."""
    tokens, outcome = token_batches(4), []
    sparse = sparsify(make_llama(), density=0.5)
    for model in (sparse, densify(copy.deepcopy(sparse))):
        torch.manual_seed(1)
        adapted = get_peft_model(
            model, AdaLoraConfig(target_modules=["up_proj"], r=2, total_step=20, tinit=1, tfinal=5)
        )
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for batch in tokens:
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outcome.append(adapted.eval()(tokens[0]).logits.detach())
    torch.testing.assert_close(*outcome, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_train_an_adapter_as_one_process(tmp_path, own):
    """DDP has to leave the sets alone, under the names that they have below an adapter."""
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        launch("adapt", ranks, directory=str(directory), own=own, per_device_train_batch_size=4 // ranks, optim="sgd")
    alone, *both = (torch.load(tmp_path / place) for place in ("1/adapter-0.pt", "2/adapter-0.pt", "2/adapter-1.pt"))
    assert [found.pop("ranks").item() for found in (alone, *both)] == [1, 2, 2]
    assert any("lora_B" in name and parameter.any() for name, parameter in alone.items())
    for name, parameter in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], parameter, rtol=0, atol=1e-5, msg=name)

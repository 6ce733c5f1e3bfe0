"""What users do with a transformers model, done with a sparse one: docs/integrations.md, line by line."""

import copy
import io
import math
import pickle

import evaluate
import optuna
import pytest
import torch
from test_loops import make_tokenizer
from torch.utils.data import DataLoader, Dataset
from toy_models import VOCABULARY, loss_of, make_gpt2, make_llama, token_batches
from toy_training import CONFIG, make_dataset, make_trainer, same_weights
from transformers import TrainingArguments, pipeline

from hf_topkast import TopKastController, TopKastTrainer, densify, sparsify
from hf_topkast.surgery import sparse_info, sparse_layers


optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def model(make_model):
    return sparsify(make_model(), copy.deepcopy(CONFIG)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(model, dtype):
    tokens = token_batches(1)[0]
    with torch.autocast("cpu", dtype):
        logits = model(tokens).logits
        loss = loss_of(model, tokens)
    assert logits.dtype == dtype
    loss.backward()
    half = {name: layer.values.grad.clone() for name, layer in sparse_layers(model)}
    model.zero_grad()
    expected = loss_of(model, tokens)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for name, layer in sparse_layers(model):
        assert half[name].dtype == layer.values.dtype == torch.float32
        assert half[name].norm().item() == pytest.approx(layer.values.grad.norm().item(), rel=0.05)
        assert torch.nn.functional.cosine_similarity(half[name], layer.values.grad, dim=0) > 0.99


@pytest.mark.parametrize("settings", [{"bf16": True}, {"fp16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_settings_that_change_rounding_only(make_model, tmp_path, settings):
    losses = []
    for extra in ({}, settings):
        trainer = make_trainer(tmp_path, make_model, max_steps=6, **extra)
        trainer.train()
        assert trainer.topkast_controller.step == 6
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert (losses[0] == losses[1]) == ("bf16" not in settings)


@pytest.mark.slow
class TestHyperparameterSearch:
    def make_trainer(self, directory):
        self.models = []

        def model_init(trial=None):
            # The density is a hyperparameter like any other.
            density = trial.suggest_categorical("density", [0.1, 0.3]) if trial is not None else 0.2
            self.models.append(sparsify(make_gpt2(), density=density, refresh_every=2))
            return self.models[-1]

        args = TrainingArguments(
            output_dir=str(directory),
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = make_dataset()
        return TopKastTrainer(model_init=model_init, args=args, train_dataset=data, eval_dataset=data[:8])

    def test_each_trial_has_its_own_model_and_controller(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        controllers, begin = [], trainer.callback_handler.on_train_begin

        def on_train_begin(*args):
            control = begin(*args)
            controllers.append(trainer.topkast_controller)
            return control

        trainer.callback_handler.on_train_begin = on_train_begin
        grid = optuna.samplers.GridSampler({"density": [0.1, 0.3], "learning_rate": [1e-3, 1e-2]}, seed=0)
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-2])},
            n_trials=4,
            backend="optuna",
            sampler=grid,
        )
        assert math.isfinite(best.objective) and set(best.hyperparameters) == {"density", "learning_rate"}
        assert len({id(controller) for controller in controllers}) == 4
        assert [controller.step for controller in controllers] == [4] * 4
        densities = {controller.metrics()["topkast/density"] for controller in controllers}
        assert sorted(densities) == pytest.approx([0.1, 0.3], abs=2e-3)

    def test_model_init_alone(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.train()
        first = copy.deepcopy(trainer.model)
        trainer.train()  # from a fresh model again
        assert same_weights(first, trainer.model) and trainer.topkast_controller.step == 4


class TestGeneration:
    @pytest.fixture
    def model(self, model):
        for _, layer in sparse_layers(model):
            layer.values.data.mul_(20)  # what an untrained model generates depends on its embeddings only
        return model

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_cache": False},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "top_k": 5},
            {"cache_implementation": "static"},
        ],
        ids=str,
    )
    def test_equals_the_densified_model(self, model, settings):
        dense = densify(copy.deepcopy(model))
        prompt = token_batches(1)[0][:, :6]
        outputs = []
        for one in (model, dense):
            torch.manual_seed(0)
            mask = torch.ones_like(prompt)
            outputs.append(one.generate(prompt, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **settings))
        assert outputs[0].shape[1] > prompt.shape[1]
        assert torch.equal(*outputs)

    def test_pipeline(self, model):
        tokenizer = make_tokenizer()
        texts = []
        for one in (model, densify(copy.deepcopy(model))):
            generator = pipeline("text-generation", model=one, tokenizer=tokenizer)
            texts.append(generator("w5 w7 w9", max_new_tokens=6, do_sample=False)[0]["generated_text"])
        assert texts[0] == texts[1] and texts[0].startswith("w5 w7 w9w")


METRIC = """
import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

class Perplexity(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, model_id):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model_id), AutoTokenizer.from_pretrained(model_id)
        tokens = [tokenizer(text, return_tensors="pt")["input_ids"] for text in predictions]
        with torch.no_grad():
            return {"perplexities": [model(each, labels=each).loss.exp().item() for each in tokens]}
"""


def test_a_metric_that_loads_the_model_by_its_name(model, tmp_path, monkeypatch):
    # As evaluate's own perplexity does, which is on the hub and so not here.
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "perplexity.py").write_text(METRIC)
    metric = evaluate.load(str(tmp_path / "perplexity.py"), cache_dir=str(tmp_path / "cache"))
    result = metric.compute(predictions=["w3 w1 w4 w1 w5", "w9 w2 w6"], model_id=str(tmp_path / "model"))
    expected = [loss_of(model, torch.tensor([tokens])).exp().item() for tokens in ([3, 1, 4, 1, 5], [9, 2, 6])]
    assert result["perplexities"] == pytest.approx(expected, rel=1e-5)


class TestCopies:
    def test_the_whole_model_by_torch_save(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert same_weights(model, loaded) and sparse_info(loaded) == sparse_info(model)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_trains_alike_and_alone(self, model, copied):
        twin, before = copied(model), copy.deepcopy(model.state_dict())
        models = [twin, copied(twin)]
        for one in models:
            optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
            controller = TopKastController(one, optimizer)
            for tokens in token_batches(4):
                loss_of(one, tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert controller.mask_churn > 0
        assert same_weights(*models)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())

    def test_in_a_worker_process_of_a_dataloader(self):
        model = sparsify(make_gpt2(), density=0.2).eval()
        loader = DataLoader(Scores(model), num_workers=1, multiprocessing_context="spawn")
        expected = [loss_of(model, tokens).item() for tokens in token_batches(2)]
        assert [score.item() for score in loader] == pytest.approx(expected)


class Scores(Dataset):
    """Losses of a model that travels to the worker by pickle."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return loss_of(self.model, token_batches(2)[index])


class TestDevicesAndTypes:
    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
    def test_casts(self, model, cast):
        tokens = token_batches(1)[0]
        logits = model(tokens).logits
        cast_logits = getattr(model, cast)()(tokens).logits
        assert cast_logits.dtype == getattr(torch, cast)
        torch.testing.assert_close(cast_logits.float(), logits, rtol=0.05, atol=0.02)

    def test_shapes_on_the_meta_device(self, model):
        model.to("meta")
        tokens = token_batches(1)[0].to("meta")
        with torch.no_grad():
            assert model(tokens).logits.shape == (3, 12, VOCABULARY)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(layer.values.grad.shape == layer.values.shape for _, layer in sparse_layers(model))
        assert "meta" in repr(model)
        with pytest.raises(NotImplementedError, match="meta"):  # torch's own: the numbers are gone
            model.to("cpu")

    def test_a_model_without_weights_is_refused(self):
        with torch.device("meta"):
            model = make_llama()
        with pytest.raises(ValueError, match="on the meta device and has no weights yet"):
            sparsify(model, density=0.2)

"""What `transformers.Trainer` does, done by TopKastTrainer: training, logging, evaluation, callbacks, data."""

import json
import math

import pytest
import torch
from toy_models import VOCABULARY, make_gpt2
from toy_training import make_dataset, make_trainer, same_weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_topkast import TopKastTrainer, densify
from hf_topkast.surgery import sparse_info, sparse_layers


class DenseTrainer(Trainer):
    """The stock Trainer, on the dense model that the sparse one was made of."""

    def __init__(self, model, **kwargs):
        super().__init__(model=make_gpt2(), **kwargs)


class Events(TrainerCallback):
    """Notes every event that Trainer fires, with the step and what was logged."""

    def __init__(self):
        self.seen = []


for name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:

    def note(self, args, state, control, name=name, logs=None, **kwargs):
        self.seen.append((name, state.global_step, stock_keys(logs or {})))

    setattr(Events, name, note)


def stock_keys(logs):
    return frozenset(key for key in logs if not key.startswith("topkast/"))


def pair(directory, change=lambda trainer: None, **settings):
    """The two trainers, trained: ours with a sparse model, and the stock one with a dense one."""
    trainers = []
    for name, kind in (("sparse", TopKastTrainer), ("dense", DenseTrainer)):
        trainers.append(make_trainer(directory / name, kind=kind, callbacks=[Events()], **settings))
        change(trainers[-1])
        trainers[-1].train()
    return trainers


def events(trainer):
    return next(found for found in trainer.callback_handler.callbacks if isinstance(found, Events)).seen


def history(trainer):
    return [(entry["step"], entry["epoch"], stock_keys(entry)) for entry in trainer.state.log_history]


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 3},
        {"logging_steps": 4, "logging_first_step": True},
        {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"logging_strategy": "no", "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "logging_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5, "save_strategy": "steps", "save_steps": 3},
        {"gradient_accumulation_steps": 5, "max_steps": -1, "num_train_epochs": 1},
        {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"},
        {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"optim": "adafactor", "lr_scheduler_type": "constant"},
        {"optim": "sgd", "per_device_train_batch_size": 5},
    ],
    ids=str,
)
def test_logs_and_callbacks_as_the_stock_trainer(tmp_path, settings):
    ours, stock = pair(tmp_path, **settings)
    assert history(ours) == history(stock)
    assert events(ours) == events(stock)
    assert losses(ours, "learning_rate") == losses(stock, "learning_rate")
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen
    assert ours.topkast_controller.step == ours.state.global_step == stock.state.global_step
    assert all(math.isfinite(loss) for loss in losses(ours))


def test_the_files_of_metrics_and_state(tmp_path):
    ours, stock = pair(tmp_path, max_steps=3)
    for trainer in (ours, stock):
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_state()
    for file in ("eval_results.json", "all_results.json", "trainer_state.json"):
        one, other = (json.loads((tmp_path / name / file).read_text()) for name in ("sparse", "dense"))
        assert one.keys() == other.keys()


def test_evaluation_on_several_sets_with_metrics(tmp_path):
    def several(trainer):
        trainer.eval_dataset = {"short": make_dataset(4), "long": make_dataset(12)}
        trainer.compute_metrics = lambda output: {"count": len(output.predictions)}

    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    ours, stock = pair(tmp_path, several, **settings)
    assert history(ours) == history(stock)
    assert losses(ours, "eval_short_count") + losses(ours, "eval_long_count") == [4, 12]


@pytest.mark.parametrize("settings", [{}, {"full_determinism": True}], ids=str)
def test_seeds(tmp_path, settings, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # full_determinism writes these, and they are put back
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")

    def run(**seeds):
        trainer = make_trainer(tmp_path, **{**settings, "max_steps": 5, **seeds})
        trainer.train()
        return trainer.model

    try:
        assert same_weights(run(), run())
        assert not same_weights(run(), run(seed=8))
        assert not same_weights(run(), run(data_seed=8))
    finally:
        torch.use_deterministic_algorithms(False)


def test_early_stopping_stops_where_patience_ends(tmp_path):
    trainer = make_trainer(
        tmp_path,
        learning_rate=0.0,  # nothing gets better
        config=None,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert sparse_info(trainer.model).step == 2  # the best model's
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_logged_gradient_norm_is_that_of_what_is_trained(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=0.1)
    norms, step = [], trainer.training_step

    def training_step(*args):
        loss = step(*args)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return loss

    class Clipped(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    trainer.training_step = training_step
    trainer.add_callback(Clipped())
    trainer.train()
    assert norms[0] > 0.5 and norms[1] == pytest.approx(0.1, rel=1e-3)
    assert losses(trainer, "grad_norm") == pytest.approx(norms[:1])


def test_label_smoothing(tmp_path):
    class Densified(Trainer):
        def __init__(self, model, **kwargs):
            super().__init__(model=densify(model), **kwargs)

    results = []
    for kind, factor in ((TopKastTrainer, 0.3), (Densified, 0.3), (Densified, 0.0)):
        trainer = make_trainer(tmp_path, kind=kind, max_steps=3, label_smoothing_factor=factor, learning_rate=0.0)
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] != pytest.approx(results[2], rel=1e-4)


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    settings = {"max_steps": 6, "train_sampling_strategy": "sequential"}
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    parts = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    for trainer in (whole, parts):
        trainer.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for (_, one), (_, other) in zip(sparse_layers(whole.model), sparse_layers(parts.model)):
        torch.testing.assert_close(one.theta(), other.theta(), rtol=1e-3, atol=1e-4)


def test_group_by_length(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (48,), generator=generator).tolist()
    rows = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    batches = {}

    def pad(features):
        tokens = [torch.tensor(each["input_ids"]) for each in features]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return {"input_ids": padded, "labels": padded}

    def group(trainer):
        trainer.train_dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer.data_collator = pad
        seen, step = batches.setdefault(type(trainer), []), trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            seen.append(inputs["input_ids"]) or step(model, inputs, *rest)
        )

    ours, stock = pair(tmp_path, group, train_sampling_strategy="group_by_length")
    assert history(ours) == history(stock)
    assert len(batches[TopKastTrainer]) == 10
    assert all(torch.equal(one, other) for one, other in zip(batches[TopKastTrainer], batches[DenseTrainer]))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_dataset())


def test_iterable_dataset(tmp_path):
    def stream(trainer):
        trainer.train_dataset = Stream()

    ours, stock = pair(tmp_path, stream, max_steps=15)  # more than one pass
    assert history(ours) == history(stock)
    assert ours.topkast_controller.step == 15


def test_neftune(tmp_path):
    trainers = []
    for alpha in (None, 5.0, 5.0):
        trainers.append(make_trainer(tmp_path, max_steps=3, neftune_noise_alpha=alpha))
        trainers[-1].train()
    plain, noisy, again = trainers
    assert losses(plain)[0] != losses(noisy)[0]
    assert same_weights(noisy.model, again.model)
    assert not noisy.model.get_input_embeddings()._forward_hooks


class OutOfMemoryOnce:
    """Makes a trainer run out of memory once, after some steps of the full batch size."""

    def __init__(self, trainer, after):
        self.step, self.left, self.sizes = trainer.training_step, after, []
        trainer.training_step = self

    def __call__(self, model, inputs, *rest):
        self.sizes.append(len(inputs["input_ids"]))
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("CUDA out of memory.")
        return self.step(model, inputs, *rest)


def test_auto_find_batch_size(tmp_path):
    trainer = make_trainer(tmp_path, auto_find_batch_size=True)
    memory = OutOfMemoryOnce(trainer, after=5)  # after a refresh
    trainer.train()
    assert memory.sizes == [4] * 5 + [3] * 10
    assert trainer.topkast_controller.step == 10
    for _, layer in sparse_layers(trainer.model):
        assert trainer.optimizer.optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape


def test_auto_find_batch_size_resumes_from_the_checkpoint(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")

    def run(**settings):
        return make_trainer(tmp_path, auto_find_batch_size=True, ignore_data_skip=True, **settings)

    interrupted = run()
    OutOfMemoryOnce(interrupted, after=5)
    interrupted.train(resume_from_checkpoint=checkpoint)
    straight = run(per_device_train_batch_size=3)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"train_batch_size": 4', '"train_batch_size": 3'))
    straight.train(resume_from_checkpoint=checkpoint)
    assert same_weights(interrupted.model, straight.model)

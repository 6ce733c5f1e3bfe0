"""Loops as people write them: each trains as the plain loop does, or says what to do instead."""

import copy
import pickle

import pytest
import torch
from torch import nn
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import make_dataset, make_trainer, same_weights
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from hf_topkast import TopKastConfig, TopKastController, TopKastTrainer, densify, sparsify
from hf_topkast.surgery import sparse_layers


CONFIG = TopKastConfig(density=0.2, refresh_every=3, penalty=1e-3, exploration_lr_scale=0.5)


def prepared(make_model=make_gpt2, config=CONFIG, **settings):
    """A model, its optimizer with decay, and a controller."""
    model = sparsify(make_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **settings})
    return model, optimizer, TopKastController(model, optimizer)


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def train(model, optimizer, count=7, seed=0, step=None):
    for tokens in token_batches(count, seed):
        loss_of(model, tokens).backward()
        (step or optimizer.step)()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def plain():
    """What the plain loop gives."""
    model, optimizer, controller = prepared()
    train(model, optimizer)
    return model, optimizer, controller


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_trains_as_the_plain_loop(plain, by_name):
    model, optimizer, controller = prepared()
    for tokens in token_batches(7):

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.is_tensor(loss) and loss.requires_grad
    assert controller.step == 7 and controller.mask_churn == plain[2].mask_churn
    assert same_weights(model, plain[0])


def test_a_compiled_step_trains_as_the_plain_loop(plain):
    torch.compiler.reset()
    model, optimizer, controller = prepared(lr=torch.tensor(1e-2))
    train(model, optimizer, step=torch.compile(lambda: optimizer.step(), backend="eager"))
    assert controller.step == 7 and controller.mask_churn == plain[2].mask_churn
    for (name, layer), (_, other) in zip(sparse_layers(model), sparse_layers(plain[0])):
        assert torch.equal(layer.active_mask, other.active_mask), name
        torch.testing.assert_close(layer.theta(), other.theta(), rtol=1e-3, atol=1e-4)  # a learning rate in float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda all_of_it: pickle.loads(pickle.dumps(all_of_it))])
def test_a_copy_of_model_optimizer_and_controller_trains_on(plain, copied):
    first = prepared()
    train(*first[:2], count=4)
    model, optimizer, controller = copied(first)
    for tokens in token_batches(7)[4:]:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.step == 7 and first[2].step == 4
    assert same_weights(model, plain[0])


def test_a_copy_of_a_removed_controller_stays_removed():
    model, optimizer, controller = prepared()
    controller.remove()
    model, optimizer, controller = copy.deepcopy((model, optimizer, controller))
    train(model, optimizer, count=1)
    assert controller.step == 0


def test_another_optimizer_than_the_controllers_is_noticed():
    model, optimizer, controller = prepared()
    train(model, optimizer, count=2)
    other = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"values of layer 'transformer\.h\.0\..*another optimizer.*remove"):
        train(model, other, count=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    controller.remove()
    again = TopKastController(model, other)
    again.load_state_dict({"step": 0})
    other.zero_grad()
    train(model, other, count=3)
    assert again.step == 3 and again.mask_churn is not None


def test_an_optimizer_without_a_controller_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr("hf_topkast.training.watch.logger.warning", said.append)
    model = sparsify(make_gpt2(), CONFIG)
    train(model, torch.optim.AdamW(model.parameters()), count=3)
    assert len(said) == 1 and "without a TopKastController" in said[0]
    dense = make_gpt2()
    train(dense, torch.optim.AdamW(dense.parameters()), count=1)
    model = densify(model)
    train(model, torch.optim.AdamW(model.parameters()), count=1)
    assert len(said) == 1


def decay_groups(model):
    spared = ("bias", "ln_")
    names = dict(model.named_parameters())
    return [
        {"params": [p for n, p in names.items() if not any(s in n for s in spared)], "weight_decay": 0.1},
        {"params": [p for n, p in names.items() if any(s in n for s in spared)], "weight_decay": 0.0},
    ]


def test_an_optimizer_and_a_scheduler_given_to_the_trainer(tmp_path):
    def run(model, kind, **settings):
        optimizer = torch.optim.AdamW(decay_groups(model), lr=1e-2)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
        args = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            seed=7,
            **settings,
        )
        trainer = kind(model=model, args=args, train_dataset=make_dataset(), optimizers=(optimizer, scheduler))
        trainer.train()
        return trainer, optimizer, scheduler

    trainer, optimizer, scheduler = run(sparsify(make_gpt2(), CONFIG), TopKastTrainer, save_strategy="no")
    assert len(optimizer.param_groups) == 2 and trainer.topkast_controller.mask_churn is not None
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]

    model = sparsify(make_gpt2(), CONFIG)  # the same by hand, with the values in a group of their own
    values = {id(layer.values) for _, layer in sparse_layers(model)}
    groups = decay_groups(model)
    groups.append({"params": [p for p in groups[0]["params"] if id(p) in values], "weight_decay": 0.0})
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in values]
    by_hand = torch.optim.AdamW(groups, lr=1e-2)
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none", seed=7
    )
    pair = by_hand, get_linear_schedule_with_warmup(by_hand, 2, 10)
    reference = TopKastTrainer(model=model, args=args, train_dataset=make_dataset(), optimizers=pair)
    reference.train()
    assert same_weights(trainer.model, model)


def test_decay_in_any_loop_is_that_of_groups_split_by_hand():
    model, optimizer, _ = prepared()
    train(model, optimizer)
    other = sparsify(make_gpt2(), CONFIG)
    values = [layer.values for _, layer in sparse_layers(other)]
    ids = {id(value) for value in values}
    rest = [parameter for parameter in other.parameters() if id(parameter) not in ids]
    by_hand = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": values}], lr=1e-2, weight_decay=0.0)
    TopKastController(other, by_hand)
    train(other, by_hand)
    assert same_weights(model, other)


class Gradients(TrainerCallback):
    """Which parameters have no gradient where transformers offers to look at them."""

    def __init__(self):
        self.missing = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.missing += [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_gradients_are_there_after_a_step_with_a_refresh(tmp_path):
    looks = Gradients()
    trainer = make_trainer(tmp_path, callbacks=[looks])
    trainer.train()
    assert trainer.topkast_controller.mask_churn is not None and not looks.missing


def test_two_runs_of_one_seed_have_equal_histories(tmp_path):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    histories = []
    for name in ("one", "two"):
        trainer = make_trainer(tmp_path / name, callbacks=[Logger()])
        trainer.train()
        histories.append([logs for logs in trainer.state.log_history if "loss" in logs])
    assert histories[0] == histories[1]
    assert any("topkast/refresh_seconds" in logs for logs in seen)


def test_training_arguments_stay_as_they_were_given(tmp_path):
    trainer = make_trainer(tmp_path)
    given = TrainingArguments(**{key: getattr(trainer.args, key) for key in ("output_dir", "use_cpu", "report_to")})
    assert trainer.args.ddp_broadcast_buffers is given.ddp_broadcast_buffers is None


@pytest.mark.parametrize(
    "settings", [{"initial_density": 0.5, "schedule_end": 4}, {"distribution": "global"}, {"explore_until": 3}, {}]
)
def test_frozen_layers_keep_their_sets_and_the_others_move(settings):
    model = sparsify(make_llama(), density=0.2, refresh_every=2, **settings)
    for name, layer in sparse_layers(model):
        layer.requires_grad_("layers.0" not in name)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in sparse_layers(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = TopKastController(model, optimizer, total_steps=10)
    train(model, optimizer, count=6)
    for name, layer in sparse_layers(model):
        same = all(torch.equal(before[name][key], value) for key, value in layer.state_dict().items())
        assert same is ("layers.0" in name), name
    assert controller.mask_churn > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("density", 5, "density=5 is not allowed"),
        ("penalty", -1, "penalty=-1 is not allowed"),
        ("refresh_every", 0, "refresh_every=0 is not allowed"),
        ("block_size", [4, 4], "block_size=.*densify the model"),
        ("backend", "reference", "backend=.*densify the model"),
    ],
)
def test_settings_of_a_sparse_model_are_checked(name, value, message):
    model, optimizer, _ = prepared()
    before = copy.deepcopy(model.topkast.config)
    with pytest.raises(ValueError, match=message):
        setattr(model.topkast.config, name, value)
    assert model.topkast.config == before
    with pytest.raises(AttributeError, match="no field 'refresh_evry'"):
        model.topkast.config.refresh_evry = 3
    train(model, optimizer, count=4)


def test_settings_that_count_at_once_and_those_that_are_read_once():
    model, optimizer, controller = prepared()
    train(model, optimizer, count=2)
    model.topkast.config.density = 0.1
    train(model, optimizer, count=1)
    assert controller.density == pytest.approx(0.1, abs=1e-2)
    model.topkast.config.method = "static"
    with pytest.raises(ValueError, match="method='static' was set after the TopKastController was made.*'topkast'"):
        train(model, optimizer, count=1)
    controller.remove()
    TopKastController(model, optimizer).load_state_dict({"step": 0})
    optimizer.zero_grad()
    train(model, optimizer, count=1)


def test_weights_loaded_before_the_first_step():
    model, optimizer, controller = prepared()
    other = sparsify(make_gpt2(seed=3), CONFIG)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, count=4)
    assert controller.step == 4
    with pytest.raises(ValueError, match="optimizer's state belongs to the former ones"):
        model.load_state_dict(other.state_dict())
        train(model, optimizer, count=1)


def test_state_of_an_optimizer_loaded_before_and_after_the_controller():
    straight = prepared()
    train(*straight[:2], count=4)
    saved = copy.deepcopy([part.state_dict() for part in straight])
    train(*straight[:2], count=3, seed=1)
    for controller_first in (True, False):
        model = sparsify(make_gpt2(), CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        controller = TopKastController(model, optimizer) if controller_first else None
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # which torch trains on in place
        controller = controller or TopKastController(model, optimizer)
        controller.load_state_dict(saved[2])
        train(model, optimizer, count=3, seed=1)
        assert same_weights(model, straight[0]), controller_first


def test_a_nan_weight_is_named_before_it_spoils_the_others():
    model, optimizer, _ = prepared()
    train(model, optimizer, count=1)
    loss_of(model, token_batches(1)[0]).backward()
    model.transformer.h[1].mlp.c_fc.values.grad[3] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp\.c_fc': 1 of its"):
        train(model, optimizer, count=1)
    assert sum(int(parameter.isnan().sum()) for parameter in model.parameters()) == 1


def test_a_stock_trainer_with_the_callback_keeps_the_scheduler(tmp_path):
    from hf_topkast import TopKastCallback

    trainer = make_trainer(tmp_path, kind=Trainer, callbacks=[TopKastCallback()], weight_decay=0.1)
    trainer.train()
    values = {id(layer.values) for _, layer in sparse_layers(trainer.model)}
    assert values and len(trainer.optimizer.param_groups) == 2


def test_one_parameter_twice_in_a_loop_of_ones_own():
    """A module in two places trains as one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = model[0]
    sparsify(model, density=0.5, refresh_every=1, target_modules=["0"])
    assert model[0] is model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert controller.mask_churn is not None and len(controller.layers) == 1


def test_layers_unfrozen_later_begin_their_schedule_where_it_is():
    model = sparsify(make_llama(), density=0.2, refresh_every=2, initial_density=0.8, schedule_end=20)
    for _, layer in sparse_layers(model):
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = TopKastController(model, optimizer)
    train(model, optimizer, count=4)
    assert controller.density == pytest.approx(0.8, abs=1e-2)
    for _, layer in sparse_layers(model):
        layer.requires_grad_(True)
    train(model, optimizer, count=2)
    assert 0.35 < controller.density < 0.6  # of the way from 0.8 to 0.2, cubic, at step 6 of 20


def test_frozen_values_in_an_optimizer_are_no_reason_to_warn(monkeypatch):
    said = []
    monkeypatch.setattr("hf_topkast.training.watch.logger.warning", said.append)
    model = sparsify(make_gpt2(), CONFIG)
    for _, layer in sparse_layers(model):
        layer.values.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, count=1)
    assert not said
    for _, layer in sparse_layers(model):
        layer.values.requires_grad_(True)
    train(model, optimizer, count=1)
    assert len(said) == 1

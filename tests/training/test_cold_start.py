import copy

import pytest
import torch
from masked_methods import AgedAdam
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.training.cold_start import ENTERED


CHANGES = {"density": 0.2, "refresh_every": 2, "penalty": 0.0, "new_state": "fresh"}


def make_training(make_optimizer, **config):
    """A sparse model in float64, with its optimizer and controller."""
    model = sparsify(make_gpt2(dtype=torch.float64), **{**CHANGES, **config})
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, TopKastController(model, optimizer, total_steps=100)


def step(model, optimizer, tokens):
    optimizer.zero_grad()
    loss_of(model, tokens).backward()
    optimizer.step()


class Dense:
    """
    The Adam of the oracle on the dense θ of every sparse layer, led by the gradients and the sets that the sparse
    model has.
    """

    def __init__(self, model, **settings):
        self.layers = dict(sparse_layers(model))
        self.thetas = {name: layer.theta() for name, layer in self.layers.items()}
        self.known = {name: layer.pattern.backward_mask() for name, layer in self.layers.items()}
        rest = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        self.adam = AgedAdam({"params": list(self.thetas.values()), "lr": settings.pop("lr")}, rest, **settings)

    def see_gradients(self):
        """Before a step."""
        self.places = {name: layer.pattern.flat_index() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            self.thetas[name].grad = torch.zeros_like(self.thetas[name])
            self.thetas[name].grad.view(-1)[self.places[name]] = layer.values.grad

    def compare(self):
        """After it."""
        self.adam.step()
        entered = 0
        for name, layer in self.layers.items():
            theta, backward = self.thetas[name], layer.pattern.backward_mask()
            torch.testing.assert_close(layer.theta(), theta, rtol=1e-12, atol=1e-12)
            entering = backward & ~self.known[name]
            for state in self.adam.state[theta].values():
                state *= backward & ~entering
            self.adam.enter(theta, entering)
            self.known[name] = backward
            entered += int(entering.sum())
        return entered


KINDS = {
    "adam": (torch.optim.Adam, {}, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.5}, {}),
    "fused": (torch.optim.AdamW, {"fused": True}, {}),
    "foreach": (torch.optim.Adam, {"foreach": True, "weight_decay": 0.5}, {}),
    "tensor rate": (torch.optim.Adam, {"lr": torch.tensor(1e-2, dtype=torch.float64)}, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}, {}),
    "maximize": (torch.optim.Adam, {"maximize": True, "amsgrad": True}, {}),
    "large eps": (torch.optim.Adam, {"eps": 1e-2}, {}),
    "betas": (torch.optim.Adam, {"betas": (0.0, 0.5)}, {}),
    "warm-up": (torch.optim.AdamW, {}, {"new_state_warmup": 5}),
    "warm-up and rate": (torch.optim.AdamW, {}, {"new_state_warmup": 1, "lr_scale": 4.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_adam_with_a_step_count_for_each_weight(kind):
    make, settings, config = KINDS[kind]
    settings = {"lr": 1e-2, **settings}
    model, optimizer, controller = make_training(lambda parameters: make(parameters, **settings), **config)
    own = {key: settings[key] for key in ("betas", "eps", "amsgrad", "maximize") if key in settings}
    lr = float(settings["lr"]) * config.get("lr_scale", 1)
    dense = Dense(model, lr=lr, warmup=config.get("new_state_warmup", 0), **own)
    for tokens in token_batches(10):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        dense.see_gradients()
        optimizer.step()
        entered = dense.compare()
    assert entered > 100 and controller.step == 10


def test_counts_are_saved_loaded_and_moved():
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    batches = token_batches(12)
    model, optimizer, controller = make_training(make, new_state_warmup=4)
    for tokens in batches[:6]:
        step(model, optimizer, tokens)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))
    copies = copy.deepcopy((model, optimizer, controller))
    loaded = make_training(make, new_state_warmup=4)
    for target, state in zip(loaded, saved):
        target.load_state_dict(state)
    trainings = [(model, optimizer), copies[:2], loaded[:2]]
    for training in trainings:
        for tokens in batches[6:]:
            step(*training, tokens)
    counts = []
    for other, state in trainings:
        layers = list(sparse_layers(other))
        counts.append([state.state[layer.values][ENTERED] for _, layer in layers])
        assert all(count.shape == layer.values.shape for count, (_, layer) in zip(counts[-1], layers))
        for key, tensor in other.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), key
    assert all(torch.equal(*pair) for other in counts[1:] for pair in zip(counts[0], other))
    assert set(torch.cat(counts[0]).unique().tolist()) == {0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0}


def test_nothing_is_corrected_before_a_weight_enters():
    runs = []
    for new_state in ("zero", "fresh"):
        model, optimizer, _ = make_training(lambda p: torch.optim.AdamW(p, lr=1e-2), new_state=new_state)
        for tokens in token_batches(2):
            step(model, optimizer, tokens)
        runs.append([layer.theta() for _, layer in sparse_layers(model)])
    assert all(torch.equal(*pair) for pair in zip(*runs))


LATE = 200


@pytest.fixture(scope="module")
def shortly_before():
    """Model, optimizer and controller before the refresh at step 200, with the betas that Trainer has."""
    model = sparsify(make_gpt2(), density=0.2, refresh_every=LATE, penalty=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    controller = TopKastController(model, optimizer)
    for tokens in token_batches(LATE - 1):
        step(model, optimizer, tokens)
    return model, optimizer, controller


def first_changes(shortly_before, **config):
    """
    Median change of weights by the step after the refresh, in learning rates: of those that entered B by it, and of
    all others.
    """
    model, optimizer, controller = copy.deepcopy(shortly_before)
    controller.remove()
    for name, value in config.items():
        setattr(controller.config, name, value)
    TopKastController(model, optimizer).load_state_dict({"step": LATE - 1})
    stored = {name: layer.pattern.backward_mask() for name, layer in sparse_layers(model)}
    *_, last, following = token_batches(LATE + 1)
    step(model, optimizer, last)
    before = {name: layer.values.detach().clone() for name, layer in sparse_layers(model)}
    step(model, optimizer, following)
    entered, stayed = [], []
    for name, layer in sparse_layers(model):
        changes = (layer.values.detach() - before[name]).abs() / 1e-3
        new = ~stored[name].flatten()[layer.pattern.flat_index()]
        entered.append(changes[new]), stayed.append(changes[~new])
    return torch.cat(entered).median().item(), torch.cat(stayed).median().item()


def test_weights_that_enter_late_do_not_leap(shortly_before):
    cold, others = first_changes(shortly_before, new_state="zero")
    correction = (1 - 0.9 ** (LATE + 1)) / (1 - 0.999 ** (LATE + 1)) ** 0.5
    assert cold == pytest.approx(0.1 / 0.001**0.5 / correction, rel=0.02)  # 1.35, whatever the gradient
    assert others < 0.2
    fresh, _ = first_changes(shortly_before, new_state="fresh")
    assert fresh == pytest.approx(1, rel=0.01)  # as the first change of any weight
    warm, _ = first_changes(shortly_before, new_state="fresh", new_state_warmup=100)
    assert warm == pytest.approx(0.01, rel=0.02) and warm < others

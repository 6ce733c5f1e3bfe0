"""Training with `score="activation"` against dense tensors and masks, written here."""

import copy

import pytest
import torch
from masked_reference import MaskedLayer, MaskedTraining
from tiny_families import make_family
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import make_trainer, same_weights

from hf_topkast import CheckpointError, TopKastConfig, TopKastController, average_models, export_sparse, sparsify
from hf_topkast.checkpoints import load_checkpoint
from hf_topkast.surgery import sparse_layers


class ScoredLayer(MaskedLayer):
    """Ranks |θ| times the root mean square of the inputs, row by row or all together."""

    squares, count, mean_square = 0.0, 0, None

    def forward(self, x):
        if torch.is_grad_enabled():
            rows = x.detach().reshape(-1, x.shape[-1])
            self.squares, self.count = self.squares + rows.square().sum(0), self.count + len(rows)
        return super().forward(x)

    def scores(self):
        return self.theta.detach() * self.mean_square.sqrt()

    def choose(self, densities, block_size, parts):
        scores = self.norms(block_size)
        masks = []
        for density in densities:
            total = max(1, round(density * scores.numel()))
            mask = torch.zeros_like(scores, dtype=torch.bool)
            if self.by_row:
                for row, line in enumerate(scores):
                    share = total // len(scores) + (row < total % len(scores))
                    mask[row, torch.sort(line, descending=True, stable=True).indices[:share]] = True
            else:
                mask.view(-1)[torch.sort(scores.flatten(), descending=True, stable=True).indices[:total]] = True
            masks.append(mask)
        self.hold(*masks)


class ScoredTraining(MaskedTraining):
    """Takes the inputs of each step that ends in a refresh into the running mean."""

    def __init__(self, model, names, config, make_optimizer, norms):
        self.norms = norms
        super().__init__(model, names, config, make_optimizer)

    def choose(self):
        for name, layer in self.layers.items():
            if layer.__class__ is MaskedLayer:
                layer.__class__ = ScoredLayer
                layer.by_row, layer.mean_square = self.config.compare == "row", self.norms[name].square()
        super().choose()

    def refresh(self):
        for layer in self.layers.values():
            layer.mean_square = 0.9 * layer.mean_square + 0.1 * layer.squares / layer.count
        super().refresh()

    def step(self, micro_batches):
        for layer in self.layers.values():
            layer.squares, layer.count = 0.0, 0
        return super().step(micro_batches)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.parametrize("make_model", [make_gpt2, make_llama])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compare": "layer"},
        {"method": "dpf", "schedule_end": 6},
        {"block_size": [4, 2]},
        {"block_size": [4, 2], "scatter_blocks": True, "compare": "layer"},
    ],
    ids=str,
)
def test_training_equals_the_masked_simulation(make_model, settings):
    schedule = {"schedule_begin": 0} if "method" in settings else {}
    config = TopKastConfig(density=0.2, score="activation", refresh_every=3, penalty=1e-2, **schedule, **settings)
    model, dense = (make_model(dtype=torch.float64) for _ in range(2))
    sparsify(model, config, calibration=token_batches(2, seed=5))
    layers = dict(sparse_layers(model))
    norms = {name: layer.input_norms.clone() for name, layer in layers.items()}
    simulation = ScoredTraining(dense, list(layers), config, adamw, norms)
    optimizer = adamw(model.parameters())
    TopKastController(model, optimizer)
    batches = token_batches(20)
    for first, second in zip(batches[::2], batches[1::2]):
        simulation.step([first, second])
        for tokens in (first, second):
            logits = model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in layers.items():
            masked = simulation.layers[name]
            assert torch.equal(layer.pattern.active_mask(), masked.active)
            assert torch.equal(layer.pattern.backward_mask(), masked.backward_set)
            torch.testing.assert_close(layer.theta(), masked.theta.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(layer.input_norms, masked.mean_square.sqrt(), rtol=1e-12, atol=0)
    changed = [not torch.equal(layer.input_norms, norms[name]) for name, layer in layers.items()]
    assert all(changed)


@pytest.mark.parametrize("make_model", [make_gpt2, make_llama])
def test_norms_follow_a_training_in_evaluation_mode(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    norms = []
    for mode in (True, False):
        model = type(make_model()).from_pretrained(tmp_path)  # in evaluation mode, in which many loops leave it
        assert not model.training
        sparsify(model.train(mode), density=0.2, refresh_every=2, calibration=token_batches(1))
        first = [layer.input_norms.clone() for _, layer in sparse_layers(model)]
        optimizer = adamw(model.parameters())
        TopKastController(model, optimizer)
        for tokens in token_batches(2, seed=1):
            with torch.no_grad():
                model(token_batches(1, seed=2)[0])  # counts in neither mode
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append([layer.input_norms for _, layer in sparse_layers(model)])
    for one, two, before in zip(*norms, first):
        torch.testing.assert_close(one, two)
        assert not torch.equal(one, before)


class CalibratedTrainers:
    """Trainers whose models were calibrated on the same batches."""

    def make(self, directory, **settings):
        def make_model():
            return make_gpt2(seed=1)

        trainer = make_trainer(directory, make_model, **settings)
        model = make_model()
        sparsify(model, density=0.2, refresh_every=3, calibration=token_batches(2))
        return type(trainer)(
            model=model, args=trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset
        )


def test_resume_is_exact(tmp_path):
    trainers = CalibratedTrainers()
    straight = trainers.make(tmp_path / "straight")
    straight.train()
    trainers.make(tmp_path / "parts", save_strategy="steps", save_steps=4, max_steps=10).train()
    resumed = trainers.make(tmp_path / "parts")
    with torch.no_grad():  # what is resumed does not depend on what was there
        for _, layer in sparse_layers(resumed.model):
            layer.input_norms.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert same_weights(straight.model, resumed.model)
    norms = [layer.input_norms for _, layer in sparse_layers(straight.model)]
    assert all((norm > 0).all() for norm in norms)


def test_files_copies_and_averages_keep_the_norms(tmp_path):
    model = sparsify(make_gpt2(), density=0.2, calibration=token_batches(2))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.topkast.config == model.topkast.config
    others = [loaded, copy.deepcopy(model), average_models([model, model])]
    for other in others:
        for (_, mine), (_, theirs) in zip(sparse_layers(model), sparse_layers(other), strict=True):
            assert torch.equal(mine.input_norms, theirs.input_norms)
    plain = sparsify(make_gpt2(), density=0.2)
    with pytest.raises(RuntimeError, match="input_norms"):
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("family", ["gpt2", "experts"])
def test_a_pass_that_is_looked_at_only_does_not_move_the_norms(family):
    """Forward with gradients on, as in an evaluation without `no_grad`, but never backward."""
    norms = []
    for looks in (False, True):
        model = make_gpt2() if family == "gpt2" else make_family("mixtral")
        sparsify(model, density=0.2, refresh_every=2, calibration=token_batches(1))
        optimizer = adamw(model.parameters())
        TopKastController(model, optimizer)
        for tokens in token_batches(2):
            if looks:
                assert model(torch.full_like(tokens, 5)).logits.requires_grad
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append([layer.input_norms for _, layer in sparse_layers(model)])
    assert all(map(torch.equal, *norms))


def test_a_step_whose_inputs_are_no_numbers_leaves_the_norms_as_they_are():
    layer = sparsify(make_gpt2(), density=0.2, refresh_every=1, calibration=token_batches(1))
    _, first = next(sparse_layers(layer))
    controller = TopKastController(layer, adamw(layer.parameters()))
    before = first.input_norms.clone()
    first.input_watch.add(torch.full((3, len(before)), torch.inf))
    controller.refresh()
    assert torch.equal(first.input_norms, before)


def test_files_whose_norms_do_not_go_with_the_settings_are_never_written(tmp_path):
    model = sparsify(make_gpt2(), density=0.2, calibration=token_batches(1))
    export_sparse(model, tmp_path / "compact")
    loaded = type(model).from_pretrained(tmp_path / "compact")
    assert loaded.topkast.config.score == "magnitude" and loaded.topkast.config.compare == "layer"
    loaded.save_pretrained(tmp_path / "again")
    type(model).from_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "scored")
    plain = sparsify(make_gpt2(), density=0.2)
    with pytest.raises(CheckpointError, match="score='activation', and layer .* made with another score"):
        load_checkpoint(plain, tmp_path / "scored")
    with pytest.raises(CheckpointError, match="method='topkast', and layer .* made with another method"):
        load_checkpoint(sparsify(make_gpt2(), density=0.2, method="set"), tmp_path / "again")
    next(sparse_layers(model))[1].input_norms = None
    with pytest.raises(CheckpointError, match="lacks norms of its inputs.*score='activation'"):
        model.save_pretrained(tmp_path / "broken")

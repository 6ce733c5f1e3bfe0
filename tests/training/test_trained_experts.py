"""Training of sparse experts: as dense weights with masks, and as layers of their own; in float64, where no two
weights come so near that rounding decides between them."""

import copy
import itertools
import re

import pytest
import torch
from masked_reference import MaskedTraining
from tiny_families import VOCABULARY, make_family
from toy_models import loss_of
from toy_training import make_trainer, same_weights
from unrolled_experts import rows_of_expert, unroll

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.layers import TopKastGroupedLinear
from hf_topkast.surgery import sparse_layers


FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
COMMON = {"density": 0.2, "refresh_every": 3, "penalty": 1e-2}
STEPS = 10


def batches(steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (4, 12), generator=generator) for _ in range(steps)]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)


def train(model, tokens):
    """A controller's training; gives it and the losses."""
    optimizer = adamw(model.parameters())
    controller = TopKastController(model, optimizer, total_steps=STEPS)
    losses = []
    for batch in tokens:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return controller, losses


def matrices(model, turn=False):
    """θ, A and B of every matrix of a model, those of experts by themselves."""
    found = {}
    for name, layer in sparse_layers(model):
        views = layer.theta(), layer.pattern.active_mask(), layer.pattern.backward_mask()
        if isinstance(layer, TopKastGroupedLinear):
            owner, _, key = name.rpartition(".")
            kind = "down" if key == "down_proj" else "up"
            for expert in range(layer.experts):
                parts = [rows_of_expert(view, expert, layer.experts, turn and kind == "up") for view in views]
                found[f"{owner}.{kind}_{expert}"] = parts
        else:
            found[name] = views
    return found


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (theta, active, backward) in found.items():
        other, *sets = expected[name]
        assert torch.equal(active, sets[0]), name
        assert torch.equal(backward, sets[1]), name
        torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-6, msg=name)


SCHEDULES = {
    "uniform": {},
    "linear": {"initial_density": 0.9, "density_schedule": "linear", "schedule_begin": 0, "schedule_end": 6},
    "cubic": {"initial_density": 0.8, "density_schedule": "cubic", "schedule_begin": 2, "schedule_end": 7},
    "cosine": {"initial_density": 0.6, "density_schedule": "cosine", "schedule_begin": 0, "schedule_end": 9},
    "explore_until": {"explore_until": 6},
    "global": {"distribution": "global"},
    "blocks": {"block_size": 4},
    "scattered": {"block_size": [2, 4], "scatter_blocks": True},
    "split_fused": {"split_fused": True},
    "split blocks": {"split_fused": True, "block_size": [4, 2]},
    "decoupled": {"penalty_mode": "decoupled", "exploration_lr_scale": 0.3},
    "lag": {"refresh_lag": 2},
    "host": {"reservoir_device": "cpu"},
    "disk": {"reservoir_device": "disk"},
}


# `make test-all` runs all of them.
def case(family, settings):
    few = family in ("mixtral", "gpt_oss") or settings in ("uniform", "global", "lag")
    return pytest.param(family, settings, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize(("family", "settings"), [case(*each) for each in itertools.product(FAMILIES, SCHEDULES)])
def test_training_is_that_of_dense_masked_experts(family, settings):
    config = TopKastConfig(**COMMON, **SCHEDULES[settings])
    if family == "deepseek_v3":  # whose keys and values no rule splits
        config.exclude_modules = ["kv_b_proj"]
    if family == "gpt_oss" and config.split_fused and config.block_size != [1, 1]:
        pytest.skip("blocks of several rows do not fit gate and up that lie in turn")
    model = make_family(family).double().train()
    dense = copy.deepcopy(model)
    sparsify(model, config)
    turn = config.split_fused and family == "gpt_oss"
    unrolled = unroll(dense, split=config.split_fused)
    names = [name for name, _ in sparse_layers(model) if name not in unrolled]
    names += [name for layers in unrolled.values() for name in layers]
    if config.distribution == "global":  # ties go by the order of the layers: there are none
        assert len(names) == len(matrices(model))
    parts = {f"up_{expert}": 2 for expert in range(4)} if config.split_fused else {}
    oracle = MaskedTraining(dense, names, config, adamw, parts=parts)
    tokens = batches()
    _, losses = train(model, tokens)
    expected = [oracle.step([batch]) for batch in tokens]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-6)
    sets = {name: (layer.theta.detach(), layer.active, layer.backward_set) for name, layer in oracle.layers.items()}
    check_same(matrices(model, turn), sets)


METHODS = {
    "erdos_renyi": {"distribution": "erdos_renyi"},
    "overrides": {"density_overrides": {r".*down.*": 0.4, r".*\.0\.mlp.*up.*": 0.1}},
    "row": {"compare": "row"},
    "static": {"method": "static"},
    "rigl": {"method": "rigl", "drop_share": 0.3},
    "rigl blocks": {"method": "rigl", "drop_share": 0.3, "block_size": [2, 4]},
    "rigl scattered": {"method": "rigl", "drop_share": 0.3, "block_size": [2, 4], "scatter_blocks": True},
    "powerprop": {"powerprop_alpha": 2.0, "penalty": 0.0},
    "dpf": {"method": "dpf", "initial_density": 1.0, "schedule_begin": 0, "schedule_end": 5},
}


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_training_is_that_of_experts_as_layers_of_their_own(family, settings):
    config = TopKastConfig(**{**COMMON, **METHODS[settings]})
    model = make_family(family).double().train()
    single = copy.deepcopy(model)
    unroll(single)
    sparsify(model, config)
    sparsify(single, config)
    begin_alike(model, single)
    tokens = batches()
    check_same(train(model, tokens)[0] and matrices(model), train(single, tokens)[0] and matrices(single))


def begin_alike(model, single):
    """Where the first sets are drawn at random, by the names of layers: gives one model's to the other."""
    layers = dict(sparse_layers(single))
    for name, (theta, active, backward) in matrices(model).items():
        layers[name].reassign(active.clone(), backward.clone(), theta.clone())


def pruned(model, share=0.6):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search("_proj", name) and parameter.ndim > 1:
                keep = torch.rand(parameter.shape, generator=generator) < share
                parameter.mul_(keep)
    return model


def test_pruned_experts_keep_their_own_sizes():
    model = pruned(make_family("mixtral")).double().train()
    single = copy.deepcopy(model)
    unroll(single)
    for each in (model, single):
        sparsify(each, density="nonzero", refresh_every=3, penalty=1e-2)
    sizes = {name: int(active.sum()) for name, (_, active, _) in matrices(model).items() if "up_" in name}
    assert len(set(sizes.values())) > 1
    tokens = batches()
    check_same(train(model, tokens)[0] and matrices(model), train(single, tokens)[0] and matrices(single))


def test_an_expert_of_zeros_is_named():
    model = pruned(make_family("mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 0
    with pytest.raises(ValueError, match=r"expert 2 of 'model\.layers\.1\.mlp\.experts\.down_proj' holds only zeros"):
        sparsify(model, density="nonzero")


@pytest.mark.parametrize(
    "settings", [{}, {"compare": "layer"}, {"compare": "layer", "block_size": [2, 4], "scatter_blocks": True}], ids=str
)
@pytest.mark.parametrize("correct", [False, True])
def test_scores_by_activations_are_those_of_experts_as_layers(settings, correct):
    model = make_family("mixtral").double().train()
    single = copy.deepcopy(model)
    unroll(single)
    seen = batches(3, seed=7)
    for each in (model, single):
        sparsify(each, calibration=seen, correct=correct, density=0.3, refresh_every=3, penalty=1e-2, **settings)
    tokens = batches()
    check_same(matrices(model), matrices(single))
    check_same(train(model, tokens)[0] and matrices(model), train(single, tokens)[0] and matrices(single))
    norms = dict(sparse_layers(model))["model.layers.0.mlp.experts.down_proj"].input_norms
    others = dict(sparse_layers(single))
    for expert, norm in enumerate(norms):
        torch.testing.assert_close(norm, others[f"model.layers.0.mlp.experts.down_{expert}"].input_norms)


@pytest.mark.parametrize(
    "method", ["set", "gse", "mest", "topkast_random", "static_random", "smet", "magnitude_pruning"]
)
def test_random_methods_keep_every_experts_sizes(method):
    model = sparsify(make_family("mixtral"), density=0.25, method=method, refresh_every=2).train()
    before = {name: int(active.sum()) for name, (_, active, _) in matrices(model).items()}
    train(model, batches(5))
    after = {name: int(active.sum()) for name, (_, active, _) in matrices(model).items()}
    assert method == "magnitude_pruning" or before == after
    assert len({count for name, count in after.items() if "up_" in name}) == 1


def test_an_expert_without_tokens_keeps_its_sets_where_gradients_choose():
    model = sparsify(make_family("mixtral"), density=0.25, method="rigl", refresh_every=1, drop_share=0.5).train()
    busy = set()
    for name, block in model.model.layers.named_children():
        block.mlp.gate.weight.data.zero_()  # equal scores: two experts get all tokens

        def see(module, args, name=name):
            counts = args[1].diff(prepend=args[1].new_zeros(1))
            busy.update(
                f"model.layers.{name}.mlp.experts.{kind}_{int(e)}" for kind in ("up", "down") for e in counts.nonzero()
            )

        block.mlp.experts.gate_up_proj.register_forward_pre_hook(see)
    before = {name: active.clone() for name, (_, active, _) in matrices(model).items()}
    train(model, batches(1))
    after = {name: active for name, (_, active, _) in matrices(model).items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in before if re.search(r"up_|down_", name)}
    assert len(busy) == 8 and changed & experts == busy


RESUMED = {
    "lag": {"refresh_lag": 2},
    "schedule": {"initial_density": 0.8, "schedule_begin": 0, "schedule_end": 6, "distribution": "global"},
    "blocks on disk": {"block_size": [2, 4], "scatter_blocks": True, "reservoir_device": "disk"},
    "rigl": {"method": "rigl", "drop_share": 0.3},
    "explored": {"explore_until": 5, "split_fused": True},
}


@pytest.mark.parametrize("settings", RESUMED)
@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_resumed_training_is_the_straight_one_bit_for_bit(family, settings, tmp_path):
    def trainer(directory, seed=0, **arguments):
        config = TopKastConfig(**{**COMMON, **RESUMED[settings], **block_rows(family, settings)})
        return make_trainer(directory, lambda: make_family(family, seed), config, max_steps=9, **arguments)

    straight = trainer(tmp_path, save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)
    straight.train()
    resumed = trainer(tmp_path / "again", seed=1, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(straight.model, resumed.model)


def block_rows(family, settings):
    in_turn = family == "gpt_oss" and "block" in settings
    return {"block_size": [1, 4], "scatter_blocks": False} if in_turn else {}


@pytest.mark.parametrize("method", ["topkast", "rigl"])
def test_gradient_checkpointing_and_accumulation_change_nothing(method):
    def trained(checkpointing, pieces):
        model = make_family("mixtral").double().train()
        sparsify(model, density=0.2, refresh_every=2, method=method)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        TopKastController(model, optimizer, total_steps=4)
        for batch in batches(4):
            for piece in batch.chunk(pieces):
                (loss_of(model, piece) / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
        return matrices(model)

    expected = trained(False, 1)
    check_same(trained(True, 1), expected)
    check_same(trained(True, 2), expected)

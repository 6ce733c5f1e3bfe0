import copy

import pytest
import torch
from toy_models import make_gpt2, make_llama, token_batches

from hf_topkast import TopKastConfig, sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.surgery.calibration import input_norms


MAKERS = [make_gpt2, make_llama]


def inputs_of(model, names, batches):
    """What each layer is given, token by token, in evaluation mode."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen[name].append(args[0]))
        for name in names
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]) for name, rows in seen.items()}


def rows_of(name, model):
    weight = model.get_submodule(name).weight.detach()
    return weight.T if "Conv1D" in type(model.get_submodule(name)).__name__ else weight


@pytest.mark.parametrize("make_model", MAKERS)
@pytest.mark.parametrize("compare", ["row", "layer"])
def test_first_sets_are_the_largest_by_weight_and_input(make_model, compare):
    batches = token_batches(3)
    model, dense = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    model.train()
    sparsify(model, density=0.3, compare=compare, calibration=iter(batches))
    assert model.training and model.topkast.config.score == "activation"
    layers = dict(sparse_layers(model))
    inputs = inputs_of(dense, layers, batches)
    for name, layer in layers.items():
        norms = inputs[name].square().mean(0).sqrt()
        torch.testing.assert_close(layer.input_norms, norms)
        scores = rows_of(name, dense).abs() * norms
        assert torch.equal(layer.theta(), rows_of(name, dense))
        for mask, count in (
            (layer.pattern.active_mask(), layer.active_count),
            (layer.pattern.backward_mask(), layer.values.numel()),
        ):
            assert int(mask.sum()) == count
            if compare == "layer":
                assert scores[mask].min() >= scores[~mask].max()
            else:
                shares = mask.sum(1)
                assert shares.max() - shares.min() <= 1 and torch.equal(shares, shares.sort(descending=True).values)
                least = torch.where(mask, scores, torch.inf).amin(1)
                assert (least >= torch.where(mask, -torch.inf, scores).amax(1)).all()


def test_padding_does_not_count():
    tokens = token_batches(1)[0]
    model = make_llama()
    names = ["model.layers.0.self_attn.q_proj"]
    layers = {name: model.get_submodule(name) for name in names}
    padded = {
        "input_ids": torch.cat([tokens, torch.zeros_like(tokens)], 1),
        "attention_mask": torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], 1),
    }
    torch.testing.assert_close(input_norms(model, layers, padded), input_norms(model, layers, tokens))


def test_a_feature_that_is_never_active_ranks_last_and_has_an_order():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    x = torch.randn(5, 4)
    x[:, 1] = 0
    norms = input_norms(model, {"0": model[0]}, x)["0"]
    assert norms.argmin() == 1 and norms[1] > 0
    sparsify(model, density=0.5, target_modules="all-linear", calibration=[x])
    assert not model[0].active_mask[:, 1].any()


def refused(message, **settings):
    model = make_gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.transformer.h[0].eval()
    with pytest.raises(ValueError, match=message):
        sparsify(model, density=0.3, **settings)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert model.transformer.h[1].training and not model.transformer.h[0].training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration has no batch"),
        ([torch.full((1, 4), 10_000)], "batch 1 does not fit GPT2LMHeadModel.*IndexError"),
        ([{"pixels": torch.ones(2)}], "batch 1 does not fit GPT2LMHeadModel.*ValueError"),
        (["a text"], "batch 1 does not fit GPT2LMHeadModel"),
    ],
)
def test_batches_that_do_not_fit(calibration, message):
    refused(message, calibration=calibration)


def test_score_and_calibration_go_together():
    refused("score='activation' and calibration left out", score="activation")
    refused("score='magnitude' and calibration given", score="magnitude", calibration=token_batches(1))
    with pytest.raises(ValueError, match="score='magnitude' and calibration given"):
        sparsify(make_gpt2(), TopKastConfig(density=0.3), calibration=token_batches(1))


@pytest.mark.parametrize("method", ["static", "topkast"])
def test_a_pruned_model_keeps_what_it_has_whatever_its_rows(method):
    pruned = make_llama()
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            if "proj" in name:  # the first rows have nothing, the last ones all
                parameter[: len(parameter) // 2] = 0
    model = copy.deepcopy(pruned)
    sparsify(model, density="nonzero", method=method, calibration=token_batches(1))
    tokens = token_batches(1, seed=1)[0]
    torch.testing.assert_close(model(tokens).logits, pruned(tokens).logits)
    for name, layer in sparse_layers(model):
        assert torch.equal(layer.pattern.active_mask(), pruned.get_submodule(name).weight != 0)
    with pytest.raises(ValueError, match="compare='row' is not allowed.*density='nonzero'"):
        sparsify(pruned, density="nonzero", compare="row", calibration=token_batches(1))


@pytest.mark.parametrize("field", ["score", "compare"])
def test_methods_that_do_not_rank_refuse_it(field):
    value = {"score": "activation", "compare": "row"}[field]
    with pytest.raises(ValueError, match=f"{field}='{value}' is not allowed: it must be .* with method='rigl'"):
        TopKastConfig(method="rigl", **{field: value, **({"compare": "layer"} if field == "score" else {})})


def test_a_layer_without_inputs_is_named():
    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="layer 'unused' got no input from 1 batches"):
        sparsify(Forgetful(), density=0.5, target_modules="all-linear", calibration=torch.ones(2, 4))


def test_inputs_that_are_no_numbers_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    with pytest.raises(ValueError, match="inputs of layer '0' are NaN or infinite.*2 such layers"):
        sparsify(model, density=0.5, target_modules="all-linear", calibration=torch.full((3, 4), float("inf")))

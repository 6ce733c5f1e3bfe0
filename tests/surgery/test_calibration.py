import copy

import pytest
import torch
from tiny_families import VOCABULARY, make_family
from toy_models import make_gpt2, make_llama, token_batches

from hf_topkast import TopKastConfig, sparsify
from hf_topkast.layers import expert_stacks
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


def test_padding_does_not_count_where_tokens_have_a_dimension_more():
    tokens = EXPERT_TOKENS[0]
    model = make_family("deepseek_v3")
    name = "model.layers.0.self_attn.kv_b_proj"  # its inputs are (batch, 1, tokens, in)
    layers = {name: model.get_submodule(name)}
    padded = {
        "input_ids": torch.cat([tokens, torch.ones_like(tokens)], 1),
        "attention_mask": torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], 1),
    }
    torch.testing.assert_close(
        input_norms(model, layers, padded), input_norms(model, layers, tokens), rtol=1e-4, atol=1e-6
    )


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
        ([{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}], "batch 1 does not fit.*return_tensors='pt'"),
    ],
)
def test_batches_that_do_not_fit(calibration, message):
    refused(message, calibration=calibration)


def test_score_and_calibration_go_together():
    refused("score='activation' and calibration left out", score="activation")
    refused("score='magnitude' and calibration given", score="magnitude", calibration=token_batches(1))


def test_a_config_without_a_score_takes_that_of_the_calibration():
    config = TopKastConfig(density=0.3)
    model = sparsify(make_gpt2(), config, calibration=token_batches(1))
    assert model.topkast.config == TopKastConfig(density=0.3, score="activation")
    assert (model.topkast.config.compare, config.score) == ("row", "magnitude")  # the caller's is as it was
    model = sparsify(make_gpt2(), TopKastConfig.for_finetuning(0.3), calibration=token_batches(1))
    assert model.topkast.config == TopKastConfig(density=0.3, score="activation", method="static", penalty=0.0)


@pytest.mark.parametrize("make_config", [TopKastConfig, TopKastConfig.for_finetuning])
@pytest.mark.parametrize("compare", ["row", "layer", None])
def test_a_config_with_compare_alone_keeps_it(make_config, compare):
    config = make_config(density=0.3, compare=compare)
    model = sparsify(make_gpt2(), config, calibration=token_batches(1))
    assert (model.topkast.config.score, model.topkast.config.compare) == ("activation", compare or "row")
    config.score = "activation"  # as the recipes do
    assert config == model.topkast.config
    config.density = 0.2
    assert config.compare == (compare or "row")


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


EXPERT_TOKENS = [torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(n)) for n in range(3)]


def stacks_of(model):
    return {name: stack for name, stack in expert_stacks(model).items() if "shared" not in name}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe", "longcat_flash", "llama4_text"])
def test_norms_of_experts_are_those_of_the_tokens_that_came_to_them(family):
    model = make_family(family).double()
    seen = {}
    with pytest.MonkeyPatch.context() as patch:  # what each matrix is multiplied by, in the family's own forward
        for name, stack in stacks_of(model).items():
            for expert in range(stack.experts):
                seen[name, expert] = []
        if family == "llama4_text":
            record_batched(patch, model, seen)
        else:
            model.config._experts_implementation = "eager"
            record_one_by_one(patch, model, seen)
        for tokens in EXPERT_TOKENS:
            with torch.no_grad():
                model(tokens)
    parameters = [name for name, _ in model.named_parameters()]
    norms = input_norms(model, stacks_of(model), iter(EXPERT_TOKENS))
    assert [name for name, _ in model.named_parameters()] == parameters
    for name, stack in stacks_of(model).items():
        for expert in range(stack.experts - stack.unused):
            rows = torch.cat(seen[name, expert])
            rows = rows[rows.any(1)]
            torch.testing.assert_close(norms[name][expert], rows.square().mean(0).sqrt())
        assert bool((norms[name][stack.experts - stack.unused :] == 1).all())


def record_one_by_one(patch, model, seen):
    """Notes inputs of products by `weight[expert]`."""
    places = {}
    for name, stack in stacks_of(model).items():
        for expert in range(stack.experts):
            places[stack.weight[expert].data_ptr()] = name, expert
    linear, matmul = torch.nn.functional.linear, torch.Tensor.__matmul__

    def note(x, weight):
        if weight.data_ptr() in places:
            seen[places[weight.data_ptr()]].append(x.detach())

    def noted_linear(x, weight, bias=None):
        note(x, weight)
        return linear(x, weight, bias)

    def noted_matmul(x, weight):
        note(x, weight)
        return matmul(x, weight)

    patch.setattr(torch.nn.functional, "linear", noted_linear)
    patch.setattr(torch.Tensor, "__matmul__", noted_matmul)


def record_batched(patch, model, seen):
    """Notes inputs of products of all experts at once."""
    places = {stack.weight.data_ptr(): name for name, stack in stacks_of(model).items()}
    bmm = torch.bmm

    def noted(x, weight):
        for expert, rows in enumerate(x if weight.data_ptr() in places else ()):
            seen[places[weight.data_ptr()], expert].append(rows.detach())
        return bmm(x, weight)

    patch.setattr(torch, "bmm", noted)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_padding_does_not_count_for_experts(family):
    tokens = EXPERT_TOKENS[0]
    model = make_family(family).double()
    padded = {
        "input_ids": torch.cat([tokens, torch.ones_like(tokens)], 1),
        "attention_mask": torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], 1),
    }
    found, expected = (input_norms(model, stacks_of(model), batch) for batch in (padded, tokens))
    for name, norm in expected.items():
        torch.testing.assert_close(found[name], norm, rtol=1e-6, atol=1e-8)


def test_an_expert_that_no_token_chooses_is_named_and_nothing_changes():
    model = make_family("mixtral")
    model.model.layers[1].mlp.gate.weight.data.zero_()  # equal scores: two experts get all tokens
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_parameters()]
    match = r"expert \d of 'model\.layers\.1\.mlp\.experts\.gate_up_proj' was chosen for no token of 3 batches"
    with pytest.raises(ValueError, match=rf"calibration: {match} \(4 such experts\).*exclude_modules"):
        sparsify(model, density=0.3, calibration=EXPERT_TOKENS)
    after = model.state_dict()
    assert names == [name for name, _ in model.named_parameters()] and not list(sparse_layers(model))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    sparsify(model, density=0.3, calibration=EXPERT_TOKENS, exclude_modules=r".*\.1\.mlp\.experts")

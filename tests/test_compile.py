"""`torch.compile` and sparse layers: one graph for a training step, and the same one after a refresh."""

import pytest
import torch
from torch._dynamo.utils import counters
from toy_models import choose_sets, make_gpt2, make_llama, token_batches
from toy_training import CONFIG, make_trainer, same_weights

from hf_topkast import TopKastConfig, TopKastController, densify, sparsify
from hf_topkast.surgery import sparse_layers


BACKEND = "aot_eager"  # traces forward and backward as inductor does, without a minute of C++ compilation


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def with_loss(model):
    model.loss_type = "ForCausalLM"  # what transformers falls back to; it warns inside the forward otherwise
    return model


def train(model, forward, steps=8, autocast=False):
    """Trains, and returns how many graphs there were after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    controller = TopKastController(model.train(), optimizer)
    graphs = []
    for tokens in token_batches(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(compiled_graphs())
    assert controller.mask_churn > 0
    return graphs


@pytest.mark.parametrize(
    ("make_model", "variant"),
    [(make_gpt2, "plain"), (make_llama, "plain"), (make_gpt2, "autocast"), (make_gpt2, "checkpointing")],
)
def test_a_training_step_is_one_graph_across_refreshes(make_model, variant):
    models = [with_loss(sparsify(make_model(), density=0.2, refresh_every=2)) for _ in range(2)]
    if variant == "checkpointing":
        for model in models:
            model.gradient_checkpointing_enable()  # the name that all of transformers 5 knows
            model.config.use_cache = False  # transformers warns otherwise, which breaks the graph
    compiled = torch.compile(models[0], backend=BACKEND, fullgraph=True)
    autocast = variant == "autocast"
    assert set(train(models[0], compiled, autocast=autocast)) == {1}
    train(models[1], models[1], autocast=autocast)
    assert same_weights(*models)


@pytest.mark.parametrize("scatter", [False, True])
def test_a_layer_that_keeps_its_walk_by_columns_is_one_graph_across_refreshes(scatter):
    model = torch.nn.Sequential(torch.nn.Linear(96, 64))
    blocks = {"block_size": 16, "scatter_blocks": scatter}
    sparsify(model, density=0.3, backward_density=0.5, refresh_every=1, target_modules=["0"], **blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controller, compiled = TopKastController(model, optimizer), torch.compile(model, backend=BACKEND, fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 96)
        torch.testing.assert_close(compiled(x).detach(), model(x).detach())
        (compiled(x) - 1).square().sum().backward()
        optimizer.step()
    assert controller.mask_churn > 0 and model[0].pattern.column_walk is not None
    assert compiled_graphs() == 1


def test_the_end_of_exploration_compiles_once_more():
    settings = {"density": 0.2, "refresh_every": 2, "explore_until": 4}
    model, eager = (with_loss(sparsify(make_gpt2(), **settings)) for _ in range(2))
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    assert train(model, compiled) == [1, 1, 1, 1, 2, 2, 2, 2]
    train(eager, eager)
    assert same_weights(model, eager)


def test_sizes_that_change_often_need_two_graphs_where_torch_is_told():
    model = with_loss(sparsify(make_gpt2(), density=0.5))
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    with torch._dynamo.config.patch(dict.fromkeys(names, False)):
        for density in (0.45, 0.4, 0.35, 0.3):
            tokens = token_batches(1)[0]
            compiled(input_ids=tokens, labels=tokens).loss.backward()
            for _, layer in sparse_layers(model):
                layer.reassign(*choose_sets(layer.theta(), density, 2 * density))
    assert compiled_graphs() == 2


def test_inference_is_one_graph():
    model = sparsify(make_gpt2(), density=0.2).eval()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with torch.no_grad():
        for tokens in token_batches(2):
            torch.testing.assert_close(compiled(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert compiled_graphs() == 1


def wrapped(model):
    return torch.compile(model, backend=BACKEND)


def in_place(model):
    model.compile(backend=BACKEND)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("compile_model", [wrapped, in_place])
def test_a_model_compiled_before_sparsify(compile_model):
    config = TopKastConfig(density=0.2, refresh_every=2, target_modules=r"transformer\.h\.\d+\.mlp\.c_fc")
    model = with_loss(make_gpt2())
    compiled = compile_model(model)
    compiled(input_ids=token_batches(1)[0])  # so that there is a graph of the dense model
    assert sparsify(compiled, config) is compiled
    expected = with_loss(sparsify(make_gpt2(), config))
    before = compiled_graphs()
    assert set(train(model, compiled)) == {before + 1}
    train(expected, expected)
    assert same_weights(model, expected)
    tokens = token_batches(1)[0]
    logits = compiled(input_ids=tokens).logits
    assert densify(compiled) is compiled
    torch.testing.assert_close(compiled(input_ids=tokens).logits, logits)


def test_trainer_flag(tmp_path):
    def run(name, resume=None, **settings):
        trainer = make_trainer(tmp_path / name, lambda: with_loss(make_gpt2()), CONFIG, max_steps=8, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    flag = {"torch_compile": True, "torch_compile_backend": BACKEND, "save_strategy": "steps", "save_steps": 4}
    compiled = run("compiled", **flag)
    assert compiled_graphs() == 1
    assert same_weights(compiled, run("eager"))
    assert same_weights(compiled, run("resumed", resume=str(tmp_path / "compiled" / "checkpoint-4"), **flag))

"""What the settings of the methods are, and which are refused."""

import copy

import pytest
import torch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastConfig, TopKastController, register_method, sparsify
from hf_topkast.method import METHODS
from hf_topkast.sets import Timetable
from hf_topkast.surgery import sparse_layers


# As the papers have them: steps between updates, share of A exchanged at first and at the end, how it decays, and
# when the last exchange is.
PAPERS = {
    "set": (100, 0.3, 0.0, "cosine", 0.75),
    "rigl": (100, 0.3, 0.0, "cosine", 0.75),
    "gse": (1000, 0.2, 0.0, "cosine", 1.0),
    "mest": (100, 0.1, 0.0, "staged", 0.75),
    "smet": (100, 0.2, 0.005, "cosine", 1.0),
}


@pytest.mark.parametrize("method", PAPERS)
def test_settings_are_those_of_the_papers(method):
    config = TopKastConfig(method=method)
    fields = ("refresh_every", "drop_share", "drop_end", "drop_decay", "update_until")
    assert [getattr(config, name) for name in fields] == [
        pytest.approx(value) if isinstance(value, float) else value for value in PAPERS[method]
    ]
    assert config.backward_density == config.density == 0.2
    assert (config.new_state, config.new_state_warmup) == (("fresh", 100) if method == "smet" else ("zero", 0))


def test_mest_counts_all_weights():
    shares = [TopKastConfig(method="mest", density=density).drop_share for density in (0.02, 0.05, 0.1, 0.5)]
    assert shares == pytest.approx([0.5, 0.4, 0.2, 0.04])


def test_settings_of_pruning():
    pruning, dpf = (TopKastConfig(method=name) for name in ("magnitude_pruning", "dpf"))
    window = (pruning.initial_density, pruning.density_schedule, pruning.schedule_begin, pruning.schedule_end)
    assert window == (1.0, "cubic", 0.25, 0.75) and pruning.backward_density == 0.2
    window = (dpf.initial_density, dpf.density_schedule, dpf.schedule_begin, dpf.schedule_end)
    assert window == (1.0, "cubic", 0.0, 0.5) and dpf.backward_density == 1.0
    assert dpf.penalty == 0 and dpf.refresh_every == 16


REFUSED = [
    *(("drop_share", {"method": method, "drop_share": 0.1}) for method in ("topkast", "static", "dpf")),
    ("drop_end", {"drop_end": 0.1}),
    ("drop_decay", {"drop_decay": "cosine"}),
    ("update_until", {"method": "magnitude_pruning", "update_until": 0.5}),
    ("update_until", {"method": "topkast_random", "update_until": 0.5}),
    *(("backward_density", {"method": method, "backward_density": 0.4}) for method in ("set", "magnitude_pruning")),
    *(("explore_until", {"method": method, "explore_until": 0.5}) for method in ("rigl", "gse")),
    *(("exploration_lr_scale", {"method": method, "exploration_lr_scale": 0.5}) for method in ("set", "smet")),
    *(("refresh_lag", {"method": method, "refresh_lag": 1}) for method in ("rigl", "gse", "mest")),
    *(("reservoir_device", {"method": method, "reservoir_device": "cpu"}) for method in ("set", "magnitude_pruning")),
    *(("powerprop_alpha", {"method": method, "powerprop_alpha": 2.0}) for method in PAPERS),
    ("powerprop_alpha", {"powerprop_alpha": 0.5}),
    ("distribution", {"method": "set", "distribution": "global"}),
    ("initial_density", {"method": "magnitude_pruning", "initial_density": 0.1}),
    ("initial_density", {"method": "static_random", "initial_density": 0.5}),
    ("density", {"method": "magnitude_pruning", "density": "nonzero"}),
    ("density", {"method": "dpf", "density": "nonzero"}),
    ("new_state_warmup", {"new_state_warmup": 10}),
    ("new_state_warmup", {"new_state": "mean", "new_state_warmup": 10}),
    ("new_state_warmup", {"method": "smet", "new_state": "zero", "new_state_warmup": 10}),
    ("new_state_warmup", {"new_state": "fresh", "new_state_warmup": -1}),
    ("drop_share", {"method": "set", "drop_share": 1.5}),
    ("drop_end", {"method": "set", "drop_end": 0.4}),
    ("drop_decay", {"method": "set", "drop_decay": "linear"}),
    ("update_until", {"method": "set", "update_until": 1.5}),
    ("lr_scale", {"lr_scale": 0.0}),
    ("seed", {"seed": -1}),
    ("method", {"method": "lottery"}),
]


@pytest.mark.parametrize(("field", "settings"), REFUSED, ids=str)
def test_what_a_method_passes_over_is_refused(field, settings):
    with pytest.raises(ValueError, match=rf"^{field}={settings.get(field)!r} "):
        TopKastConfig(**settings)


def test_smet_without_its_state_needs_no_warm_up_said():
    config = TopKastConfig(method="smet", new_state="zero")
    assert config.new_state_warmup == 0


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.SGD, torch.optim.NAdam, torch.optim.Adagrad])
def test_step_counts_are_for_adam(kind):
    model = sparsify(make_gpt2(), new_state="fresh")
    optimizer = kind(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"new_state='fresh'.*{kind.__name__}"):
        TopKastController(model, optimizer)


def test_step_counts_need_whole_precision():
    model = sparsify(make_gpt2(dtype=torch.bfloat16), new_state="fresh")
    with pytest.raises(ValueError, match=r"new_state='fresh'.*bfloat16.*transformer\.h\.0"):
        TopKastController(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    "method", [name for name in METHODS if METHODS[name].defaults.get("update_until") is not None]
)
def test_fractions_of_training_need_its_length(method):
    model = sparsify(make_gpt2(), method=method)
    with pytest.raises(ValueError, match="update_until=.*total_steps"):
        TopKastController(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("method", ["rigl", "gse"])
def test_a_refresh_by_hand_has_no_gradients(method):
    model = sparsify(make_gpt2(), method=method, refresh_every=3, update_until=100)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = TopKastController(model, optimizer)
    sets = [layer.pattern.columns for _, layer in sparse_layers(model)]
    for _ in range(2):
        loss_of(model, token_batches(1)[0]).backward()
        with pytest.raises(ValueError, match=rf"method='{method}'.*transformer\.h\.0.*no backward pass"):
            controller.refresh()
        optimizer.step()
    assert all(torch.equal(one, layer.pattern.columns) for one, (_, layer) in zip(sets, sparse_layers(model)))
    loss_of(model, token_batches(1)[0]).backward()
    controller.refresh()  # the coming step ends in a refresh, so that its gradients are there
    assert controller.mask_churn > 0


@pytest.mark.parametrize("method", ["rigl", "gse", "mest"])
def test_a_layer_that_a_step_passes_by_keeps_its_sets(method):
    model = sparsify(make_gpt2(), method=method, refresh_every=1, update_until=100, drop_share=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    model.transformer.h[1].mlp.forward = lambda x: x
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    same = {key: torch.equal(one, before[key]) for key, one in model.state_dict().items() if "columns" in key}
    assert [key for key, equal in same.items() if equal] == [
        f"transformer.h.1.mlp.{n}.columns" for n in ("c_fc", "c_proj")
    ]
    assert set(controller.layer_churn) == {key.removesuffix(".columns") for key, equal in same.items() if not equal}


def test_a_layer_whose_weight_is_multiplied_by_elsewhere_is_named_before_anything_changes():
    model = sparsify(make_gpt2(), method="rigl", refresh_every=1, update_until=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopKastController(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    layer = model.transformer.h[1].mlp.c_fc
    layer.forward = lambda x: x @ layer.weight + layer.bias
    loss_of(model, token_batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc.*1 such layers.*exclude_modules"):
        optimizer.step()
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


def test_fields_that_follow_others_are_no_errors():
    assert TopKastConfig(method="smet", drop_share=0.001).drop_end == 0.001
    assert TopKastConfig(method="smet", drop_decay="constant").drop_end == 0
    with pytest.raises(ValueError, match="drop_end=0.1.*drop_decay='constant'"):
        TopKastConfig(method="set", drop_decay="constant", drop_end=0.1)
    with pytest.raises(ValueError, match="defaults has 'lr_scale'"):
        register_method("own", by_columns, defaults={"lr_scale": 3.0})
    assert "own" not in METHODS


@pytest.fixture
def own():
    """Registers a method for one test."""
    names = []

    def register(choose, **properties):
        names.append("own")
        register_method("own", choose, **properties)
        return "own"

    yield register
    for name in names:
        METHODS.pop(name, None)


def by_columns(view):
    """The first places, column by column."""
    mask = torch.zeros_like(view.theta, dtype=torch.bool).T.contiguous()
    mask.view(-1)[: view.size] = True
    return mask.T.contiguous()


def test_a_method_of_ones_own(own):
    seen = []

    def choose(view):
        seen.append(view)
        return by_columns(view)

    defaults = {"drop_share": 0.1, "drop_decay": "constant", "drop_end": 0.0, "update_until": 4, "refresh_every": 2}
    config = TopKastConfig(method=own(choose, keeps_values=False, defaults=defaults), density=0.3)
    assert config.backward_density == 0.3 and config.refresh_every == 2
    model = sparsify(make_gpt2(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopKastController(model, optimizer)
    for tokens in token_batches(6):
        loss_of(model, tokens).backward()
        optimizer.step()
    layers = len(list(sparse_layers(model)))
    assert [view.active is None for view in seen] == [True] * layers + [False] * 2 * layers
    assert {view.drop for view in seen[layers:]} == {0.1}
    assert all(layer.reservoir.numel() == 0 for _, layer in sparse_layers(model))


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda view: torch.ones_like(view.theta, dtype=torch.bool), "a set A of 1728 of .* 346 of"),
        (lambda view: (by_columns(view), ~by_columns(view)), "a set B of 1382"),
        (lambda view: by_columns(view).T, r"a set A of 346 of \(24, 72\)"),
        (lambda view: by_columns(view).float(), "a set A of torch.float32"),
        (lambda view: (by_columns(view), by_columns(view).flip(1)), "A that is not inside B"),
    ],
)
def test_sets_of_wrong_sizes_are_refused(own, choose, message):
    model = make_gpt2()
    with pytest.raises(ValueError, match=rf"method='own' gave layer 'transformer\.h\.0\.attn\.c_attn'.*{message}"):
        sparsify(model, method=own(choose), density=0.2)
    assert not list(sparse_layers(model))


def test_names_of_the_package_are_taken(own):
    for name in ("topkast", "rigl"):
        with pytest.raises(ValueError, match=f"'{name}' is a method of hf_topkast"):
            register_method(name, by_columns)
    own(by_columns)
    own(by_columns, keeps_values=False)  # again: the last counts
    assert not METHODS["own"].keeps_values
    with pytest.raises(TypeError, match="function of a LayerView"):
        register_method("other", 3)
    with pytest.raises(TypeError, match="explore"):
        register_method("other", by_columns, explore=True)
    assert "other" not in METHODS


def test_gradients_that_there_are_not_are_refused(own):
    with pytest.raises(ValueError, match=r"gradient='dens'.*'active' or 'dense'"):
        own(by_columns, gradient="dens")


def test_a_method_that_names_one_field_of_the_exchange_gets_the_others():
    register_method("own", by_columns, keeps_values=False, defaults={"drop_share": 0.2, "drop_decay": "cosine"})
    try:
        config = TopKastConfig(method="own")
        exchange = config.drop_share, config.drop_end, config.drop_decay, config.update_until
        assert exchange == (0.2, 0.0, "cosine", 1.0)
        assert Timetable.of(config, 100).drop(50) == pytest.approx(0.1)
    finally:
        METHODS.pop("own")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "nonzero", "powerprop_alpha": 2}, "powerprop_alpha=2.*density='nonzero'"),
        ({"method": "dpf", "backward_density": 0.4}, "backward_density=0.4.*method='dpf', whose B is everything"),
        (
            {"method": "magnitude_pruning", "initial_density": 0.5, "density_overrides": {".*": 0.9}},
            "initial_density=0.5.*at least every density",
        ),
    ],
    ids=str,
)
def test_settings_that_would_do_nothing_or_the_wrong_thing(settings, message):
    with pytest.raises(ValueError, match=message):
        TopKastConfig(**settings)
    assert TopKastConfig(density="nonzero", method="static", powerprop_alpha=2).powerprop_alpha == 2


def test_what_is_pruned_stays_out_of_a_training_that_begins_again():
    model = sparsify(make_gpt2(), method="magnitude_pruning", density=0.2, refresh_every=1, schedule_begin=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer, total_steps=10)
    for tokens in token_batches(4):
        loss_of(model, tokens).backward()
        optimizer.step()
    held = controller.density
    controller.remove()
    again = TopKastController(model, optimizer, total_steps=1000)
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    assert again.density <= held < 0.8

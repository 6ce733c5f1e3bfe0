import pickle
import re
from pathlib import Path

import pytest
import torch
from toy_models import make_gpt2

from hf_topkast import LayerView, TopKastConfig, register_method, sparsify, sparsity_report
from hf_topkast.method import METHODS, Method, describe_method, get_method


DOCS = Path(__file__).parents[3] / "docs" / "methods.md"
OURS = sorted(METHODS)


@pytest.fixture
def own_methods():
    """Takes back what a test registers."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_unknown_method_is_refused():
    assert get_method("topkast") is METHODS["topkast"]
    with pytest.raises(ValueError, match="method='lottery'.*static.*topkast.*register_method"):
        get_method("lottery")


def test_only_static_methods_never_choose_again():
    assert [name for name, method in METHODS.items() if not method.refreshes] == ["static", "static_random"]


@pytest.mark.parametrize("name", OURS)
def test_what_a_method_needs_stands_in_the_report_and_the_docs(name):
    report = sparsity_report(sparsify(make_gpt2(), method=name, density=0.2))
    needs = get_method(name).needs
    assert report.to_dict()["needs"] == {name: needs}
    said = str(report).splitlines()[-1]
    assert said.startswith("MiB: ") if needs == "nothing" else said == f"method {name} also needs {needs}"
    settings, needs = (re.search(rf"^\|.*`{name}`.*$", part, re.M) for part in DOCS.read_text().split("## What they"))
    assert settings and needs


@pytest.mark.parametrize("name", OURS)
def test_every_default_is_a_field_and_follows_the_method(name):
    config = TopKastConfig(density=0.2)
    config.method = name
    assert config == TopKastConfig(density=0.2, method=name)
    config.method = "topkast"
    assert config == TopKastConfig(density=0.2)


def test_weights_outside_b_are_stored_where_a_method_keeps_them():
    for name, method in METHODS.items():
        model = sparsify(make_gpt2(), method=name, density=0.2)
        resting = sum(layer.reservoir.numel() for layer in model.modules() if hasattr(layer, "reservoir"))
        assert (resting > 0) == (method.keeps_values and method.backward_ratio < 5), name


def test_the_worked_example_of_the_docs(own_methods, capsys):
    (example,) = re.findall(r"```python\n(import.*?)```", DOCS.read_text(), re.S)
    assert len(example.strip().splitlines()) <= 30
    torch.manual_seed(0)
    exec(example, {})
    churn = float(capsys.readouterr().out.split()[0])
    capsys.readouterr()
    torch.manual_seed(0)
    exec(example.replace('method="sticky"', 'method="topkast"'), {})
    assert 0 < churn < float(capsys.readouterr().out.split()[0])


def test_a_class_can_be_a_method(own_methods):
    class Largest:
        def __init__(self, share: float):
            self.share = share

        def __call__(self, view: LayerView):
            order = view.theta.abs().flatten().argsort(descending=True)
            active = torch.zeros(view.theta.numel(), dtype=torch.bool)
            active[order[: view.size]] = True
            return active.view_as(view.theta)

    rule = Largest(0.5)
    assert register_method("largest", rule, keeps_values=False, defaults={"refresh_every": 7}) is rule
    assert METHODS["largest"] == Method(rule, keeps_values=False, defaults={"refresh_every": 7})
    model = sparsify(make_gpt2(), method="largest", density=0.3)
    assert model.topkast.config.refresh_every == 7
    assert sparsity_report(model).density == pytest.approx(0.3, abs=1e-3)


def test_names_of_ours_and_what_is_no_function_are_refused(own_methods):
    with pytest.raises(ValueError, match="'rigl' is a method of hf_topkast"):
        register_method("rigl", lambda view: view.theta > 0)
    with pytest.raises(TypeError, match=r"register_method\('mine'\) needs a function.*3"):
        register_method("mine", 3)
    with pytest.raises(TypeError, match="explore"):
        register_method("mine", lambda view: view.theta > 0, explore=True)
    assert "mine" not in METHODS


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda view: view.theta.abs() > 100, "a set A of 0 of .*where .* are asked for"),
        (lambda view: view.theta.abs(), "a set A of torch.float32"),
        (lambda view: (halves(view), ~halves(view)), "an A that is not inside B"),
    ],
)
def test_wrong_sets_are_refused_and_the_model_stays_as_it_was(own_methods, wrong, message):
    register_method("wrong", wrong, explores=True)
    model = make_gpt2()
    with pytest.raises(ValueError, match=f"method='wrong' gave layer 'transformer.h.0.attn.c_attn' {message}"):
        sparsify(model, method="wrong", density=0.5)
    assert not sparsity_report(model).rows


def halves(view: LayerView) -> torch.Tensor:
    mask = torch.zeros(view.theta.numel(), dtype=torch.bool)
    mask[: view.size] = True
    return mask.view_as(view.theta)


@pytest.mark.parametrize("name", OURS)
def test_a_method_can_be_pickled_and_says_what_it_is(name):
    """As it is with a controller."""
    method = pickle.loads(pickle.dumps(get_method(name)))
    assert method.choose is get_method(name).choose
    assert describe_method(name).startswith(f'`method="{name}"` (')


def test_a_method_of_a_user_is_told_by_its_name(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method(get_method("set").choose))
    assert describe_method("mine") == '`method="mine"`'

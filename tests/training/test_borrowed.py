"""Trainers may give a model a forward that holds the model: no copy of it is to run the original."""

import copy
import functools
from types import MethodType

import pytest
import torch
from toy_models import make_llama, token_batches
from transformers import TrainingArguments

from hf_topkast import TopKastAveragedModel, average_models, densify, sparsify
from hf_topkast.training.borrowed import borrowers
from hf_topkast.training.callback import check_reference
from hf_topkast.training.teacher import check_teacher


TOKENS = token_batches(1)[0]


def in_a_closure(model):
    """As TRL does."""
    former = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: former(*args, **kwargs), model)


def wrapped(model):
    former = model.forward

    @functools.wraps(former)
    def forward(*args, **kwargs):
        return former(*args, **kwargs)

    model.forward = functools.partial(forward, use_cache=False)


def in_an_object(model):
    class Caller:
        def __init__(self, former):
            self.former = former

        def __call__(self, *args, **kwargs):
            return self.former(*args, **kwargs)

        __deepcopy__ = copy.copy  # as functions

    caller = Caller(model.forward)
    model.forward = lambda *args, **kwargs: caller(*args, **kwargs)


def in_a_default(model):
    model.forward = lambda *args, former=model.forward, **kwargs: former(*args, **kwargs)


def in_a_list(model):
    held = {"forwards": [model.forward]}
    model.forward = lambda *args, **kwargs: held["forwards"][0](*args, **kwargs)


def bound(model):
    """As accelerate's autocast: a copy has one that is bound to the copy."""
    model.forward = MethodType(type(model).forward, model)


LENDING = [in_a_closure, wrapped, in_an_object, in_a_default, in_a_list]


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("patch", LENDING)
def test_an_average_computes_with_its_own_weights(patch):
    model = sparsify(make_llama(), density=0.3)
    expected = logits(model)
    patch(model)
    assert borrowers(copy.deepcopy(model), model)
    running, soup = TopKastAveragedModel(model), average_models([model])
    running.update_parameters(model)
    moved(model)
    for average in (running.module, soup):
        assert torch.equal(logits(average), expected)
        assert not borrowers(average, model)
    assert not torch.equal(logits(model), expected) and "forward" in vars(model)


def test_a_forward_that_came_along_stays():
    model = sparsify(make_llama(), density=0.3)
    bound(model)
    twin = copy.deepcopy(model)
    assert not borrowers(twin, model) and twin.forward.__self__ is twin
    assert "forward" in vars(TopKastAveragedModel(model).module)


@pytest.mark.parametrize("patch", LENDING)
def test_a_teacher_that_runs_its_student_is_refused(patch):
    student = make_llama()
    patch(student)
    teacher = copy.deepcopy(student)
    sparsify(student, density=0.3)
    with pytest.raises(ValueError, match="runs the student.*del teacher.forward"):
        check_teacher(teacher, student, hidden=False)
    del teacher.forward
    check_teacher(teacher, student, hidden=False)


def test_the_part_that_runs_another_model_is_named():
    student = make_llama()
    in_a_closure(student.model)
    teacher = copy.deepcopy(student)
    with pytest.raises(ValueError, match="Call `del teacher.model.forward`"):
        check_teacher(teacher, student, hidden=False)


def test_a_reference_that_runs_the_model_is_refused():
    model = sparsify(make_llama(), density=0.3)
    in_a_closure(model)
    reference = copy.deepcopy(model)
    in_a_closure(reference)  # as the next trainer does
    with pytest.raises(
        ValueError, match="reference model's forward runs the model in training.*del ref_model.forward"
    ):
        check_reference(TrainingArguments(), model, reference)
    average = TopKastAveragedModel(model).module
    in_a_closure(average)
    for fine in (average, model, None):
        check_reference(TrainingArguments(), model, fine)


def test_names_that_were_never_given_a_value():
    model = make_llama()

    def forward(*args, **kwargs):
        return later(*args, **kwargs)

    model.forward = forward
    assert not borrowers(copy.deepcopy(model), model)
    later = densify

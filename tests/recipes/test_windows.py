import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from windows import IGNORED, EvaluationWindows, TrainingWindows


START = 10_000  # larger than any token of these tests


@st.composite
def splits(draw):
    """A split of distinct tokens, so that a token tells where it came from, and a window that it can fill."""
    num_tokens = draw(st.integers(1, 300))
    window = draw(st.integers(2, num_tokens + 1))
    return np.arange(num_tokens, dtype=np.uint16), window


@given(splits())
def test_evaluation_predicts_every_token_once_and_in_place(split):
    tokens, window = split
    stream = [START, *tokens.tolist()]
    predicted = []
    for example in EvaluationWindows(tokens, window, START, "valid"):
        input_ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        assert len(input_ids) == len(labels) == window
        begin = stream.index(input_ids[0])
        assert input_ids == stream[begin : begin + window]
        assert all(label in (IGNORED, token) for label, token in zip(labels, input_ids))
        assert labels[0] == IGNORED, "the model cannot predict the first token of a window"
        predicted += [label for label in labels if label != IGNORED]
    assert predicted == tokens.tolist()


@given(splits())
def test_evaluation_context_is_half_a_window_or_all_there_is(split):
    tokens, window = split
    for example in EvaluationWindows(tokens, window, START, "valid"):
        labels = example["labels"].tolist()
        for context, label in enumerate(labels):  # as many tokens stand before position i of a window as i says
            if label != IGNORED:
                everything_before = label + 1  # tokens are 0, 1, 2, ... after the start token
                assert context >= min(window / 2, everything_before)


@given(splits())
def test_training_predicts_every_token_once_but_for_a_short_tail(split):
    tokens, window = split
    examples = list(TrainingWindows(tokens, window, START, "train"))
    predicted = [token for example in examples for token in example["labels"][1:].tolist()]
    assert predicted == tokens[: len(predicted)].tolist()
    assert len(tokens) - len(predicted) < window - 1
    assert examples[0]["input_ids"][0] == START
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in examples)


def test_windows_have_the_type_that_models_read():
    example = EvaluationWindows(np.zeros(20, np.uint8), 8, 0, "valid")[1]
    assert example["input_ids"].dtype == example["labels"].dtype == torch.int64


def test_training_labels_are_not_the_inputs_themselves():
    example = TrainingWindows(np.zeros(20, np.uint8), 8, 0, "train")[0]
    example["labels"][0] = 5
    assert example["input_ids"][0] == 0


@pytest.mark.parametrize("kind", [TrainingWindows, EvaluationWindows])
def test_short_split_is_an_error_that_names_it_and_the_sizes(kind):
    kind(np.zeros(127, np.uint8), 128, 0, "test")
    with pytest.raises(ValueError, match=r"test split has 126 tokens.*127 .*`window` is 128"):
        kind(np.zeros(126, np.uint8), 128, 0, "test")


@pytest.mark.parametrize("kind", [TrainingWindows, EvaluationWindows])
def test_window_of_one_is_an_error(kind):
    with pytest.raises(ValueError, match="`window` is 1"):
        kind(np.zeros(10, np.uint8), 1, 0, "test")


@pytest.mark.parametrize("kind", [TrainingWindows, EvaluationWindows])
def test_index_past_the_end_is_an_error(kind):
    windows = kind(np.zeros(20, np.uint8), 8, 0, "test")
    with pytest.raises(IndexError):
        windows[len(windows)]

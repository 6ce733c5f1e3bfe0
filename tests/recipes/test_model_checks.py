"""Models that cannot be trained to predict the next token are found before they are."""

import pytest
import torch
from model_checks import check_causal, check_length, is_causal
from transformers import AutoConfig, AutoModelForCausalLM


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=20, **SIZES, **more))


def test_only_a_model_that_sees_no_later_token_is_causal():
    model = bert(is_decoder=True)
    assert model.training and is_causal(model, 8)
    assert model.training, "dropout was switched off for good"
    assert not is_causal(bert(), 8)
    assert is_causal(bert(), 1), "one token has none after it"


@pytest.mark.parametrize("window", [None, 5, 100])
def test_the_error_names_the_model_and_the_way(window):
    check_causal(bert(is_decoder=True), "mine", window)
    with pytest.raises(ValueError, match="`mine` predicts tokens from those that come after them.*is_decoder: true"):
        check_causal(bert(), "mine", window)


def test_a_length_that_the_model_cannot_read_is_named():
    model = bert(max_position_embeddings=64)
    check_length(model, "window", 64)
    check_length(model, "window", None)
    with pytest.raises(ValueError, match="`window` is 65, but the model reads 64 tokens at most"):
        check_length(model, "window", 65)


def test_logits_that_are_no_numbers_are_told():
    model = bert(is_decoder=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="BertLMHeadModel are NaN"):
        is_causal(model, 8)

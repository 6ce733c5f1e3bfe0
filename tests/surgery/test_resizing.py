import copy

import pytest
import torch
from toy_models import make_gpt2, make_llama
from transformers import LlamaForCausalLM

from hf_topkast import sparsify
from hf_topkast.layers import TopKastLayer


def untied():
    config = copy.deepcopy(make_llama().config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [make_gpt2, make_llama, untied])
def test_a_dense_head_is_resized(make):
    model = sparsify(make(), density=0.2)
    size = model.config.vocab_size + 5
    model.resize_token_embeddings(size)
    assert model.get_output_embeddings().weight.shape[0] == size


@pytest.mark.parametrize("arguments", [{}, {"mean_resizing": False}])
def test_a_sparse_head_is_not(arguments):
    model = sparsify(untied(), density=0.2, target_modules=["up_proj", "lm_head"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="head of the model is sparse.*Resize the embeddings before sparsify"):
        model.resize_token_embeddings(model.config.vocab_size + 5, **arguments)
    assert isinstance(model.lm_head, TopKastLayer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

"""Small models and data for tests."""

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_topkast.method import LayerView
from hf_topkast.sets.methods import topkast
from hf_topkast.sets.selection import set_size


VOCABULARY = 48


def make_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A two-block GPT-2 (`Conv1D`, tied head) without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=2,
        n_positions=32,
        vocab_size=VOCABULARY,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A two-block Llama (`nn.Linear` without bias, untied head)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


MAKERS = {"gpt2": make_gpt2, "llama": make_llama}


def token_batches(steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of 3 sequences of 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (3, 12), generator=generator) for _ in range(steps)]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token loss in the model's own dtype; transformers' own loss would round to float32."""
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def choose_sets(theta: torch.Tensor, density: float, backward_density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of Top-KAST as masks of the shape of `theta`."""
    sizes = (set_size(theta.numel(), share) for share in (density, backward_density))
    return topkast.choose(LayerView(theta, *sizes))

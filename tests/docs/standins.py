"""What code blocks of the docs take for granted, tiny and local: models of the hub, a tokenizer, data, arguments."""

import copy
import os
import re
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import hf_topkast


VOCABULARY = 257
# Every training of a block ends after so many steps.
STEPS = 3
TEXTS = ["def add(a, b):\n    return a + b\n", "The weather is fine today, and so it will be tomorrow."] * 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of two blocks that blocks of 64 weights fit."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        n_positions=256,
        vocab_size=VOCABULARY,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=256,
        eos_token_id=256,
    )
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def make_pruned() -> GPT2LMHeadModel:
    """The same with half of each projection's weights zero, as a pruner leaves it."""
    return hf_topkast.densify(hf_topkast.sparsify(make_model(), density=0.5, backward_density=0.5))


def make_mixture() -> MixtralForCausalLM:
    """A mixture of four experts."""
    torch.manual_seed(0)
    config = MixtralConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=256,
    )
    return MixtralForCausalLM(config)


def save_standins(source: str):
    """Puts a stand-in for each model of the hub that a block loads by name into the working directory."""
    named = re.findall(r"from_pretrained\(\s*\"([^\"]+)\"", source)
    for name in named + ["gpt2"] * ("from_pretrained(name" in source):
        if os.path.isdir(name):
            continue
        make = (
            make_pruned if "pruned" in name else make_mixture if re.search("moe|mixtral", name.lower()) else make_model
        )
        model = make()
        if name.startswith(("sparse-", "runs/", "my-sparse")):
            hf_topkast.sparsify(model, density=0.2)
        model.save_pretrained(name)
        make_tokenizer().save_pretrained(name)


def make_dataset(count: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (count, 24), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def namespace() -> dict:
    """The names that blocks use without having made them."""
    tokenizer = make_tokenizer()
    batches = [tokenizer(text, return_tensors="pt") for text in TEXTS[:4]]
    given = {name: getattr(hf_topkast, name) for name in hf_topkast.__all__}
    given.update({name: getattr(transformers, name) for name in TRANSFORMERS})
    given.update(
        torch=torch,
        copy=copy,
        Path=Path,
        hf_topkast=hf_topkast,
        tokenizer=tokenizer,
        texts=TEXTS,
        batches=batches,
        dataset=make_dataset(),
        training_args=transformers.TrainingArguments("out"),
        config=make_model().config,
        name="gpt2",
        directory="state",
    )
    return given


TRANSFORMERS = (
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
)

"""Vocabularies: the 256 bytes, or a tokenizer from the hub or a directory."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """
    A tokenizer whose token ids are the UTF-8 bytes of the text.

    The loaders read bytes straight from memory; this exists so that a saved byte-level model has an ordinary
    tokenizer beside it, which `AutoTokenizer.from_pretrained` loads. There are no special tokens.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: With 256 tokens.
    """
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    `AutoTokenizer.from_pretrained`, with a check that there is a vocabulary in it.

    Args:
        name_or_path (`str`): A hub id or a directory.

    Raises:
        `ValueError`: If the tokenizer came back empty, which Transformers 5 does without a word where the
            directory holds a tokenizer configuration but no vocabulary that it reads.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    known = [token for token in ids if token != tokenizer.unk_token_id]
    if not known:
        raise ValueError(
            f"The tokenizer in `{name_or_path}` is empty: it has {len(tokenizer)} tokens and reads 'hello world' as "
            f"{ids}. Give `--tokenizer` a directory with a complete `tokenizer.json`, as `save_pretrained` writes it, "
            "or a hub id such as `gpt2`."
        )
    return tokenizer


def start_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The token from which the first token of a text is predicted: end of text, or else beginning of text.

    Raises:
        `ValueError`: If the tokenizer has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise ValueError(
        f"The tokenizer `{tokenizer.name_or_path}` has neither an end-of-text nor a beginning-of-text token, so "
        "nothing can stand before the first token of a text. Set `eos_token` in its `tokenizer_config.json`."
    )

"""
A corpus: three splits of tokens, memory-mapped from a cache, and what is needed to count them.

The cache is keyed by the text itself and by the tokenizer, so a changed file or tokenizer can never meet old tokens.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arguments import DataArguments
from sources import SOURCES
from transformers import PreTrainedTokenizerBase
from vocabulary import byte_tokenizer, load_tokenizer, start_token_of


NEWLINE = ord("\n")
LINES_PER_CALL = 10_000  # enough to keep a fast tokenizer's threads busy, little enough to hold as Python lists


@dataclass(frozen=True)
class Split:
    """
    Args:
        name (`str`): train, valid or test.
        tokens (`np.ndarray`): Token ids, memory-mapped, one dimension.
        num_bytes (`int`): Bytes of the text.
        num_words (`int`, *optional*): Words of the text, see [`count_words`]; not counted for train.
    """

    name: str
    tokens: np.ndarray
    num_bytes: int
    num_words: int | None


@dataclass(frozen=True)
class Corpus:
    """
    Args:
        splits (`dict[str, Split]`): By name: train, valid and test.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of 256 bytes, or the one asked for.
        start_token (`int`): What stands before the first token of each split.
        fingerprint (`str`): Equal for equal text and tokenizer.
    """

    splits: dict[str, Split]
    tokenizer: PreTrainedTokenizerBase
    start_token: int
    fingerprint: str


def load_corpus(args: DataArguments) -> Corpus:
    """
    Reads, caps, tokenizes and caches the corpus that the arguments name.

    Args:
        args ([`DataArguments`]): Which data, how much of it, and which tokenizer.

    Raises:
        `ValueError`: If the data or the tokenizer is not what it should be; the message says what to do.
    """
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else byte_tokenizer()
    texts = SOURCES[args.dataset](args)
    # Bytes may be cut anywhere; what a tokenizer reads is cut where a line ends.
    caps = {"train": args.max_train_bytes, "valid": args.max_eval_bytes, "test": args.max_eval_bytes}
    texts = {name: cap_text(text, caps[name], at_line_end=bool(args.tokenizer)) for name, text in texts.items()}
    encoder_key = tokenizer.backend_tokenizer.to_str() if args.tokenizer else "bytes"
    splits, keys = {}, []
    for name, text in texts.items():
        keys.append(hashlib.sha256(encoder_key.encode() + b"\0" + text).hexdigest())
        path = Path(args.cache_dir).expanduser() / f"{args.dataset}-{name}-{keys[-1][:16]}.npy"
        if not path.exists():
            if args.tokenizer:
                refuse_other_encodings(text, name, args)
            save_atomically(path, encode_lines(text, tokenizer) if args.tokenizer else np.frombuffer(text, np.uint8))
        num_words = None if name == "train" else count_words(text)
        splits[name] = Split(name, np.load(path, mmap_mode="r"), len(text), num_words)
    start_token = start_token_of(tokenizer) if args.tokenizer else NEWLINE
    return Corpus(splits, tokenizer, start_token, hashlib.sha256("".join(keys).encode()).hexdigest()[:16])


def cap_text(text: bytes, max_bytes: int | None, at_line_end: bool) -> bytes:
    """The first `max_bytes` bytes (all, if `None`), or the whole lines in them."""
    if max_bytes is None or len(text) <= max_bytes:
        return text
    return text[: text.rfind(b"\n", 0, max_bytes) + 1] if at_line_end else text[:max_bytes]


def refuse_other_encodings(text: bytes, name: str, args: DataArguments) -> None:
    """Raises a `ValueError` if a split that a tokenizer is to read is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The {name} split of `{args.data_file or args.data_dir or args.dataset}` is not UTF-8, as a tokenizer "
            f"reads it ({error.reason} at byte {error.start:,}). Convert it, as `iconv -f latin1 -t utf-8` does; or "
            "with `dataset: text` leave `tokenizer` out, to train on bytes."
        ) from error


def count_words(text: bytes) -> int:
    """Words as WikiText's perplexities count them: what whitespace separates, plus one end of line for every line."""
    return len(text.split()) + text.count(b"\n")


def encode_lines(text: bytes, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """
    Token ids of a text, tokenized line by line, in the smallest unsigned integers that hold the vocabulary.

    Args:
        text (`bytes`): UTF-8.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): No special tokens are added.
    """
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    lines = text.decode().splitlines(keepends=True)
    pieces = [np.empty(0, dtype)]
    for first in range(0, len(lines), LINES_PER_CALL):
        batch = tokenizer(lines[first : first + LINES_PER_CALL], add_special_tokens=False)["input_ids"]
        pieces += [np.array(ids, dtype) for ids in batch]
    return np.concatenate(pieces)


def save_atomically(path: Path, tokens: np.ndarray) -> None:
    """Writes an `.npy` file that is either complete or not there, whatever stops or races the program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        with file.open("wb") as stream:
            np.save(stream, tokens)
        file.replace(path)

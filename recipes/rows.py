"""Conversations or texts, a row each: where they come from, and their tokens."""

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


COLUMNS = ("messages", "text")


def load_rows(name: str, split: str, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """
    The rows that are not empty, with the one column that is trained on.

    Args:
        name (`str`): A data set of the hub, or a local file of JSON lines.
        split (`str`): Of a data set of the hub.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): What is to write conversations as texts.

    Raises:
        `ValueError`: If they are not to be had, have neither column, hold something else in it, or are conversations
            and the tokenizer has no template for them.
    """
    local = Path(name).suffix in (".json", ".jsonl")
    if local and not Path(name).is_file():
        raise ValueError(f"`--dataset {name}` does not exist.")
    try:
        if local:
            rows = datasets.load_dataset("json", data_files=name, split="train")
        else:
            rows = datasets.load_dataset(name, split=split)
    except (OSError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:  # an empty file: the second
        raise ValueError(
            f"`--dataset {name}` could not be loaded ({type(error).__name__}: {error}). Give the id of a data set of "
            "the hub, or a local file of JSON lines whose name ends in .json or .jsonl."
        ) from error
    column = next((column for column in COLUMNS if column in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"`--dataset {name}` has the columns {rows.column_names}, but neither `messages`, lists of role and "
            "content, nor `text`. Rename one."
        )
    if column == "messages" and tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of `{tokenizer.name_or_path}` has no chat template, so `messages` cannot be written as "
            "one text. Use a model that was made for conversations, or save its tokenizer with a `chat_template`."
        )
    rows = rows.select_columns([column]).filter(lambda row: bool(row[column]))  # some data sets have empty lines
    if len(rows) and not _is_readable(rows[0]):
        raise ValueError(
            f"`--dataset {name}` has rows such as {str(rows[0])[:200]}. A `text` must be a string, and `messages` a "
            "list of mappings with `role` and `content` (some data sets call them `from` and `value`): convert them."
        )
    return rows


def _is_readable(row: dict[str, Any]) -> bool:
    if "text" in row:
        return isinstance(row["text"], str)
    messages = row["messages"]
    return isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)


def hold_out(rows: datasets.Dataset, count: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The rows to train on, and the last `count`, which are not.

    Raises:
        `ValueError`: If nothing would be left to train on.
    """
    left = len(rows) - count
    if left < 1:
        raise ValueError(f"`held_out` is {count:,} of {len(rows):,} rows, which leaves none to train on. Use fewer.")
    return rows.select(range(left)), rows.select(range(left, len(rows)))


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Tensor:
    """The token ids of a row, (tokens,), int64, at most `max_length`."""
    if "messages" in row:
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(row["text"])["input_ids"]
    return torch.tensor(ids[:max_length])

"""
Bits per byte and word perplexity, as `evaluate` metrics that [`~transformers.Trainer`] can use.

Both count nats (natural-logarithm units) over a whole split and divide by something that does not depend on the
tokenizer. The way there: [`token_nats`] turns the logits of a batch into nats, so that logits are never kept, and the
function that [`make_compute_metrics`] returns adds them up batch by batch.
"""

import math
from collections.abc import Callable

import datasets
import evaluate
import torch
from torch.nn import functional as F
from transformers import EvalPrediction
from windows import IGNORED


_FEATURES = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
_INPUTS = """
Args:
    predictions (`list[float]`): Nats of each window.
    references (`list[int]`): Number of tokens which each window predicts.
"""


class BitsPerByte(evaluate.Metric):
    """
    Total nats / bytes / ln 2.

    Example:

    ```py
    >>> BitsPerByte().compute(predictions=[math.log(2) * 6], references=[3])
    {'bits_per_byte': 2.0}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Bits needed per byte of text: total nats / bytes / ln 2.",
            citation="",
            inputs_description=_INPUTS + "    num_bytes (`int`, *optional*): Bytes of the text, if not one a token.",
            features=datasets.Features(_FEATURES),
        )

    def _compute(self, predictions: list[float], references: list[int], num_bytes: int | None = None) -> dict:
        num_bytes = sum(references) if num_bytes is None else num_bytes
        return {"bits_per_byte": math.fsum(predictions) / num_bytes / math.log(2)}


class WordPerplexity(evaluate.Metric):
    """
    exp(total nats / original words), comparable between tokenizers.

    Example:

    ```py
    >>> WordPerplexity().compute(predictions=[math.log(8)], references=[5], num_words=3)
    {'word_perplexity': 2.0}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per original word: exp(total nats / words).",
            citation="",
            inputs_description=_INPUTS + "    num_words (`int`): Words of the text, ends of lines included.",
            features=datasets.Features(_FEATURES),
        )

    def _compute(self, predictions: list[float], references: list[int], num_words: int) -> dict:
        nats_per_word = math.fsum(predictions) / num_words
        # Early in training a word can cost more nats than a float can exponentiate (709): report it, do not raise.
        return {"word_perplexity": math.exp(nats_per_word) if nats_per_word < 709 else math.inf}


def token_nats(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """
    Nats of each label, for `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor`): Shape (batch, window, vocabulary). Those at position i predict the label at i + 1. Or
            a tuple with them in it: Trainer gives all outputs of a model that has more, such as a router's.
        labels (`torch.Tensor`): Shape (batch, window), not shifted; -100 is not counted.

    Returns:
        `torch.Tensor`: float32 of shape (batch, window), aligned with `labels`; 0 where nothing is predicted.
    """
    if isinstance(logits, tuple):
        logits = next(output for output in logits if torch.is_tensor(output) and output.ndim == 3)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view_as(labels).roll(1, dims=1)  # from where they are predicted to their labels; the last is 0


def make_compute_metrics(
    metric: evaluate.Metric, num_tokens: int, **counts: int
) -> Callable[[EvalPrediction, bool], dict[str, float]]:
    """
    A `compute_metrics` for one split.

    Args:
        metric (`evaluate.Metric`): [`BitsPerByte`] or [`WordPerplexity`].
        num_tokens (`int`): Tokens of the split.
        counts (`int`): What the metric divides by: `num_bytes` or `num_words`.

    Returns:
        `Callable`: Works with `batch_eval_metrics` (nothing is kept but one number a window) and without it.
        It raises a `ValueError` if what was evaluated does not have `num_tokens` predictions, since its number of
        bytes or words would then be a wrong one too.
    """
    evaluated = 0

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nonlocal evaluated
        nats = torch.as_tensor(prediction.predictions).double().sum(dim=1)
        # Column 0 has no logits before it, so it is never predicted, whatever its label.
        predicted = (torch.as_tensor(prediction.label_ids)[:, 1:] != IGNORED).sum(dim=1)
        metric.add_batch(predictions=nats.tolist(), references=predicted.tolist())
        evaluated += int(predicted.sum())
        if not compute_result:
            return {}
        total, evaluated = evaluated, 0
        result = metric.compute(**counts)
        if total != num_tokens:
            raise ValueError(
                f"{total:,} tokens were evaluated, but this split has {num_tokens:,}. Evaluate the split which this "
                "`compute_metrics` was made for, with `dataloader_drop_last=False`."
            )
        return result

    return compute_metrics

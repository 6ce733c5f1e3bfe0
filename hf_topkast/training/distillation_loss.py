"""What a student is to have in common with its teacher, as functions of tensors, and the weights of each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check, number


IGNORED = -100  # the label of a position that no loss looks at

# Elements of one chunk of logits: 64 MiB in float32.
CHUNK = 2**24


@dataclass(frozen=True)
class TopKastDistillationConfig:
    """
    Weights of the parts of a distillation's loss.

    Raises:
        ValueError: if a weight is negative, all that need the teacher are 0, or the temperature is not positive.
    """

    task_weight: float = 1.0
    "Weight of the loss that training has without a teacher."
    logit_weight: float = 1.0
    "Weight of KL(teacher ‖ student) of the next token, times `temperature`²."
    hidden_weight: float = 1.0
    "Weight of the squared error of each decoder block's output over the squared norm of the teacher's."
    temperature: float = 1.0
    "What both models' logits are divided by for the KL divergence."

    def __post_init__(self) -> None:
        for name in ("task_weight", "logit_weight", "hidden_weight"):
            value = getattr(self, name)
            check(0 <= number(value) < math.inf, name, value, "a finite number, at least 0 (0 leaves the part out)")
        allowed = "a finite number above 0 (1 compares the distributions as they are)"
        check(0 < number(self.temperature) < math.inf, "temperature", self.temperature, allowed)
        if self.logit_weight == self.hidden_weight == 0:
            values = ", ".join(f"{spec.name}={getattr(self, spec.name)!r}" for spec in fields(self)[:3])
            raise ValueError(
                f"With {values} nothing is learnt from the teacher. Set logit_weight or hidden_weight above 0, or use "
                "TopKastTrainer, which needs no teacher."
            )


def next_labels(inputs: dict[str, Any]) -> Tensor:
    """
    The label that each position predicts, `IGNORED` where there is none: (batch, tokens).

    Raises:
        ValueError: if the batch has no labels.
    """
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    if inputs.get("labels") is None:
        raise ValueError(
            f"The batch has {sorted(inputs)} and no 'labels', which say where teacher and student are compared. Use a "
            "data collator that makes labels (DataCollatorForLanguageModeling(tokenizer, mlm=False)), or "
            "logit_weight=0."
        )
    labels = inputs["labels"]
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def real_tokens(inputs: dict[str, Any]) -> Tensor:
    """
    Where a batch has tokens and not padding: bool, (batch, tokens).

    Raises:
        ValueError: if its attention mask does not say so.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"The batch's attention_mask is {found}, from which padding cannot be told. Give one of shape (batch, "
            "tokens), or set hidden_weight=0."
        )
    return mask.bool()


def logit_divergence(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """
    KL(teacher ‖ student) of the next token in nats, both at a temperature, times its square (so that gradients keep
    their size, arXiv 1503.02531), summed over the positions that count.

    Args:
        student (`torch.Tensor`): logits, (batch, tokens, vocabulary).
        teacher (`torch.Tensor`): the same shape; no gradient flows to it.
        counted (`torch.Tensor`): bool, (batch, tokens).
        temperature (`float`): above 0.

    Returns:
        `torch.Tensor`: a scalar, float32 or wider.
    """
    rows = (tensor.flatten(0, 1) for tensor in (student, teacher.detach(), counted))
    return _ChunkedDivergence.apply(*rows, temperature)


class _ChunkedDivergence(torch.autograd.Function):
    """The divergence and its gradient by chunks of tokens: wide copies of the logits are never there as a whole."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, counted)
        ctx.temperature = temperature
        total = torch.zeros((), dtype=_wide(student), device=student.device)
        for own, other, _ in _chunks(student, teacher, counted, temperature):
            total += (other.exp() * (other - own)).sum()
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, counted = ctx.saved_tensors
        result = torch.zeros_like(student)
        for own, other, rows in _chunks(student, teacher, counted, ctx.temperature):
            result[rows] = ((own.exp() - other.exp()) * (gradient * ctx.temperature)).to(result.dtype)
        return result, None, None, None


def _chunks(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Iterator[tuple[Tensor, ...]]:
    """Log-probabilities of both at the rows that count, some rows at a time, and which rows these are."""
    for rows in counted.nonzero().squeeze(1).split(max(1, CHUNK // student.shape[1])):
        both = (logits[rows].to(_wide(student)) / temperature for logits in (student, teacher))
        yield *(torch.log_softmax(logits, dim=1) for logits in both), rows


def hidden_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """
    ‖student − teacher‖² / ‖teacher‖² of each token, summed over the tokens that count.

    SquareHead (arXiv 2310.06927) divides sums over the batch. Here each token is normalised by itself, so that what
    one token adds depends neither on its neighbours nor on the size of a micro-batch.

    Args:
        student (`torch.Tensor`): the output of a block, (batch, tokens, width), or with several streams (batch,
            tokens, streams, width).
        teacher (`torch.Tensor`): the same shape; no gradient flows to it.
        counted (`torch.Tensor`): bool, (batch, tokens).

    Returns:
        `torch.Tensor`: a scalar, float32 or wider.
    """
    own, other = (hidden[counted].flatten(1).to(_wide(student)) for hidden in (student, teacher.detach()))
    norms = other.square().sum(-1).clamp(min=torch.finfo(other.dtype).tiny)
    return ((own - other).square().sum(-1) / norms).sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

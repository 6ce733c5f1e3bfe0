"""Distillation under `transformers.Trainer`: a sparse student learns from a dense teacher beside its own task."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from .distillation_loss import (
    IGNORED,
    TopKastDistillationConfig,
    hidden_error,
    logit_divergence,
    next_labels,
    real_tokens,
)
from .passes import StudentPass, block_outputs
from .teacher import check_teacher, load_teacher
from .trainer import TopKastTrainerMixin


PARTS = ("task", "logits", "hidden")

# Arguments of the student's forward that a loss needs, and a teacher does not.
FOR_LOSS = ("labels", "shift_labels", "num_items_in_batch")


class TopKastDistillationMixin(TopKastTrainerMixin):
    """
    Makes any `transformers.Trainer` subclass for causal language models train a sparse student with a teacher: `class
    MyTrainer(TopKastDistillationMixin, SFTTrainer)`.

    The loss is `task_weight` · the base trainer's + `logit_weight` · KL(teacher ‖ student) at the positions with a
    label + `hidden_weight` · the normalised squared error of the decoder blocks' outputs at all tokens but padding
    (SquareHead, arXiv 2310.06927). Each is a mean over the tokens of an optimizer step, on however many micro-batches
    and processes they are. `distill/task`, `distill/logits` and `distill/hidden` are logged beside `loss`, without
    their weights. Evaluation is the base trainer's: it needs no teacher, and its loss is the task's.

    The teacher is no part of the student: no optimizer, engine or checkpoint sees it. Each process holds all of it.

    Args:
        teacher (`PreTrainedModel` or `str`): the dense model, as `copy.deepcopy(model)` keeps it before [`sparsify`];
            it is frozen and put into evaluation mode, and stays in its dtype. Or the name or directory of one, which
            is loaded in bfloat16.
        distillation ([`TopKastDistillationConfig`], *optional*): the weights; all 1 by default.

    Raises:
        TypeError: if `teacher` or `distillation` is something else.
        ValueError: as [`check_teacher`] says, or if the model is split (several GPUs in one process, tensor, context
            or sequence parallelism).
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | os.PathLike[str],
        distillation: TopKastDistillationConfig | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.distillation = TopKastDistillationConfig() if distillation is None else distillation
        if not isinstance(self.distillation, TopKastDistillationConfig):
            raise TypeError(f"distillation takes a TopKastDistillationConfig, not {distillation!r}.")
        self._check_split()
        teacher = load_teacher(teacher, getattr(self, "processing_class", None))
        check_teacher(teacher, self.accelerator.unwrap_model(self.model), self.distillation.hidden_weight > 0)
        self.teacher = teacher.eval().requires_grad_(False)
        if getattr(self.teacher, "hf_device_map", None) is None:
            self.teacher.to(self.args.device)
        self._forget_parts()
        self._step_tokens, self._micro_batches = None, 1

    def _check_split(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        split = [name for name in ("tp", "cp", "sp") if getattr(parallel, f"{name}_enabled", False)]
        if self.args.n_gpu > 1 or split:
            raise ValueError(
                f"Distillation needs the whole student in each process, and n_gpu={self.args.n_gpu} with parallelism "
                f"{split} splits it. Start one process for each GPU (accelerate launch, or CUDA_VISIBLE_DEVICES=0 for "
                "one), under DDP or FSDP2."
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_parts()
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As the base trainer's; also counts the tokens of the step that are not padding, as it counts labels."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += 1
        self._step_tokens, self._micro_batches = None, len(batches)
        if items is not None and self.distillation.hidden_weight > 0:
            tokens = sum(real_tokens(batch).sum() for batch in batches).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                tokens = self.accelerator.gather(tokens).sum()
            self._step_tokens = tokens
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the base trainer's in evaluation; in training the weighted sum of the parts."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        given = dict(inputs)  # base trainers take the labels out
        with StudentPass(self.accelerator.unwrap_model(model), self.distillation.hidden_weight > 0) as student:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        task, outputs = result if return_outputs else (result, None)
        # A trainer that says so takes means over micro-batches, which are divided by their number afterwards.
        means = num_items_in_batch is None or getattr(self, "loss_is_scaled_for_ga", None) is False
        logits, hidden = self._compare(student, given, None if means else num_items_in_batch)
        weights = self.distillation
        self._note_parts((task, logits, hidden), scaled=not means)
        loss = weights.task_weight * task + weights.logit_weight * logits + weights.hidden_weight * hidden
        return (loss, outputs) if return_outputs else loss

    def _compare(
        self, student: StudentPass, inputs: dict[str, Any], items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """Both terms that need the teacher, each scaled as the base trainer scales its loss."""
        arguments = {name: value for name, value in inputs.items() if name not in FOR_LOSS}
        arguments["use_cache"] = False
        weights = self.distillation
        errors = []
        if weights.hidden_weight > 0:
            real = real_tokens(inputs)
            student.check_blocks(real.shape)

        def see(index: int, output: Tensor) -> None:  # at once, so that the teacher's outputs need not be kept
            with torch.enable_grad():
                own = student.blocks[index]
                errors.append(hidden_error(own, output.to(own.device), real.to(own.device)).to(self.args.device))

        with torch.no_grad(), self.accelerator.autocast(AutocastKwargs(self.teacher.dtype == torch.float32)):
            if weights.hidden_weight > 0:
                with block_outputs(self.teacher, see):
                    output = self.teacher(**arguments)
            else:
                output = self.teacher(**arguments)
        zero = torch.zeros((), device=self.args.device)
        logits = hidden = zero
        if weights.hidden_weight > 0:
            tokens = self._step_tokens if items is not None else None
            hidden = torch.stack(errors).mean() * self._share(real, tokens)
        if weights.logit_weight > 0:
            with self.accelerator.autocast():
                own = student.make_logits(arguments)
            counted = next_labels(inputs) != IGNORED
            logits = logit_divergence(
                own, output.logits.to(own.device), counted.to(own.device), weights.temperature
            ) * self._share(counted, items)
        return logits, hidden

    def _share(self, counted: Tensor, items: Tensor | int | None) -> Tensor:
        """What the sum over the tokens of a micro-batch is multiplied by, as the base trainer does with its loss."""
        if items is None:
            return 1 / counted.sum().clamp(min=1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes / torch.as_tensor(items, device=counted.device).clamp(min=1)

    def _forget_parts(self) -> None:
        self._parts = torch.zeros(len(PARTS))
        self._steps = 0

    def _note_parts(self, parts: tuple[Tensor, ...], scaled: bool) -> None:
        """Adds up what a micro-batch adds to the parts of its step, for the next log."""
        now = torch.stack([part.detach().float() for part in parts])
        self._parts = self._parts.to(now.device) + (now if scaled else now / self._micro_batches)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs with the means of the parts since the last time beside each training loss."""
        if "loss" in logs and self._steps > 0:
            means = self.accelerator.reduce(self._parts, "mean") / self._steps
            logs = {**logs, **{f"distill/{name}": value for name, value in zip(PARTS, means.tolist())}}
            self._forget_parts()
        super().log(logs, *args, **kwargs)


class TopKastDistillationTrainer(TopKastDistillationMixin, Trainer):
    """
    [`TopKastTrainer`] with a teacher.

    Example:

    ```python
    teacher = copy.deepcopy(model)
    model = sparsify(model, TopKastConfig.for_finetuning(density=0.5), calibration=batches)
    TopKastDistillationTrainer(model=model, teacher=teacher, args=training_args, train_dataset=dataset).train()
    ```
    """

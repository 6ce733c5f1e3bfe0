"""Top-KAST under `transformers.Trainer`: thin, since all mask work is the controller's."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..checkpoints import (
    OUR_FILES,
    CheckpointError,
    flush,
    flush_tree,
    last_whole_checkpoint,
    load_checkpoint,
)
from ..method import describe_method
from ..storage import local, raise_together
from ..surgery import count_sparsity, keep_buffers_from_ddp, sparse_info, sparse_layers
from .callback import AHEAD_NAME, TopKastCallback, check_reference
from .controller import TopKastController
from .engines import DEEPSPEED, FSDP1
from .layer_logger import TopKastLayerLogger
from .optimizers import load_whole_state, unwrap_optimizer, whole_state
from .resuming import read_ahead, resumable_step, warn_of_other_settings


if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object


class TopKastTrainerMixin(MixedInto):
    """
    Makes any `transformers.Trainer` subclass train sparse models: `class MyTrainer(TopKastTrainerMixin, SFTTrainer)`.

    It refuses a model without sparse layers, keeps sparse values out of weight decay, logs the `topkast/` metrics to
    every logger, and resumes bit by bit. Everything else, the arguments included, is the base trainer's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_reference(self.args, self.model, getattr(self, "ref_model", None))
        self._settle_engine()
        if self._topkast_callback is None:
            self.add_callback(TopKastCallback())

    @property
    def _topkast_callback(self) -> TopKastCallback | None:
        return next((found for found in self.callback_handler.callbacks if isinstance(found, TopKastCallback)), None)

    @property
    def topkast_controller(self) -> TopKastController | None:
        """The controller of the running or last training."""
        return self._topkast_callback and self._topkast_callback.controller

    def _settle_engine(self) -> None:
        """What the engine that spreads the training over processes has to know; refuses those that cannot do it."""
        if self.is_deepspeed_enabled:
            raise ValueError(DEEPSPEED)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(FSDP1)
            # Accelerate would send every entry of the state dict as a sharded parameter, and buffers are none.
            plugin.cpu_ram_efficient_loading = False
            config = sparse_info(self.model).config
            sharded_files = not self._whole_checkpoints and self.args.save_strategy != "no"
            if config.new_state == "fresh" and sharded_files:
                raise ValueError(
                    "new_state='fresh' keeps a step count for each weight in the optimizer's state, which a "
                    "SHARDED_STATE_DICT does not bring back. Set fsdp_state_dict_type to FULL_STATE_DICT, or "
                    "save_strategy='no'."
                )
            if self._whole_checkpoints and not self._saved_by_us and self.args.save_strategy != "no":
                raise ValueError(
                    f"{type(self.model).__name__} is no transformers model, and a FULL_STATE_DICT of it could not be "
                    "resumed. Set fsdp_state_dict_type to SHARDED_STATE_DICT, or save_strategy='no'."
                )
            resizes = config.initial_density or config.explore_until or config.distribution == "global"
            if resizes and sharded_files:
                raise ValueError(
                    "Sizes of the sparse parameters change (initial_density, explore_until or distribution='global'), "
                    "and a SHARDED_STATE_DICT can only be resumed in the sizes that a model begins with. Set "
                    "fsdp_state_dict_type to FULL_STATE_DICT, or save_strategy='no'."
                )

    @property
    def _whole_checkpoints(self) -> bool:
        """Whether FSDP2 saves what one process would save; else each rank saves its shards."""
        return self.is_fsdp_enabled and "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def _saved_by_us(self) -> bool:
        """Whether checkpoints have our format; else the plain or sharded state dict, which is complete by itself."""
        return isinstance(self.model, PreTrainedModel) and (self._whole_checkpoints or not self.is_fsdp_enabled)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the base trainer's, without the values of sparse layers: the exploration penalty takes their place."""
        sparse = {f"{name}.values" for name, _ in sparse_layers(model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in sparse]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """
        Logs with the `topkast/` metrics beside each training loss. Loggers get the seconds of a refresh too; the
        history, which is part of a checkpoint, does not, so that two runs of one seed have equal states.
        """
        if self.topkast_controller is not None and "loss" in logs:
            logs = {**logs, **self.topkast_controller.metrics()}
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1].pop("topkast/refresh_seconds", None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the base trainer's, with the densities of every layer at the end."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            counts, method = count_sparsity(self.model), describe_method(sparse_info(self.model).config.method)
            with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8") as file:
                file.write(
                    f"\n## Sparsity\n\nTrained with hf_topkast, {method}. The forward pass uses "
                    f"{counts.nonzero_parameters:,} of {counts.total_parameters:,} parameters; whatever is not in the "
                    f"table is dense.\n\n{counts.to_markdown()}\n"
                )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the base trainer's; `resume_from_checkpoint=True` passes over checkpoints that were left half-written."""
        if self._topkast_callback is None:
            raise ValueError(
                "TopKastCallback was removed from this trainer, which runs the mask schedule by it. Add it again "
                "(trainer.add_callback(TopKastCallback())); to keep the sets as they are use method='static'."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"There is no whole checkpoint in {self.args.output_dir} to resume from. Give the directory of "
                    "one, or leave resume_from_checkpoint out to start from the beginning."
                )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TopKastLayerLogger):
                callback.loggers = self.callback_handler.callbacks
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        directory = os.path.join(self._get_output_dir(trial=trial), folder)
        try:
            self._check_numbers()
            if self.args.should_save and os.path.isdir(directory):
                # What stands there becomes a part of something while it is written over.
                for name in (TRAINER_STATE_NAME, AHEAD_NAME):
                    Path(directory, name).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            if self.args.should_save and os.path.isdir(directory):  # not if save_total_limit took it at once
                for path in (Path(directory, TRAINER_STATE_NAME), directory, os.path.dirname(directory)):
                    flush(path)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            good = last_whole_checkpoint(os.path.dirname(directory))
            go_on = f"The last good checkpoint is {good}; go on from it with resume_from_checkpoint=True."
            raise CheckpointError(
                f"{directory} is not written: {error} {go_on if good else 'It was the first one: start anew.'}"
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last thing before trainer_state.json, which says that all the rest is there.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            flush_tree(output_dir)

    def _check_numbers(self) -> None:
        """Whether the weights deserve a checkpoint, for which an older one may be deleted."""
        broken = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not bool(torch.isfinite(local(parameter.detach())).all())
        ]
        problem = None
        if broken:
            problem = ValueError(
                f"'{broken[0]}' holds NaN or infinite weights at step {self.state.global_step} ({len(broken)} such "
                "parameters): the loss has diverged. Lower the learning rate or clip gradients."
            )
        raise_together(problem)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | bool | None
    ) -> Any:
        if resume_from_checkpoint is not None and self._whole_checkpoints and self.model is self.model_wrapped:
            self._load_from_checkpoint(resume_from_checkpoint)  # before FSDP2 fixes the sizes of its shards
        if self.is_fsdp_enabled and self.model is self.model_wrapped:
            for _, layer in sparse_layers(self.model):
                layer.offer_columns()
        keep_buffers_from_ddp(self.model)  # as it will be wrapped: adapters have come around it or into it
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._topkast_callback.wrapped = self.model_wrapped
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        ahead = self.topkast_controller.state_dict().get("ahead")
        if self.args.should_save and ahead is not None:
            torch.save(ahead, os.path.join(output_dir, AHEAD_NAME))
        if not self._whole_checkpoints:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(unwrap_optimizer(self.optimizer), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # auto_find_batch_size starts the loop again after running out of memory, with the weights of that moment.
        if self.args.auto_find_batch_size and sparse_info(self.model).step != resumable_step(checkpoint):
            self._load_from_checkpoint(checkpoint)
        self._topkast_callback.ahead = None
        if checkpoint is not None and os.path.isfile(os.path.join(checkpoint, AHEAD_NAME)):
            self._topkast_callback.ahead = read_ahead(os.path.join(checkpoint, AHEAD_NAME))
        if checkpoint is None or not self._whole_checkpoints:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
        load_whole_state(unwrap_optimizer(self.optimizer), state)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._saved_by_us:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        step = resumable_step(resume_from_checkpoint)
        state = load_checkpoint(self.model, resume_from_checkpoint)
        if step != state.step:
            raise CheckpointError(
                f"{resume_from_checkpoint} mixes two moments: its {TRAINER_STATE_NAME} is of optimizer step {step}, "
                f"its weights are of step {state.step}. Resume from another checkpoint."
            )
        warn_of_other_settings(sparse_info(self.model).config, state)

    def _load_best_model(self) -> None:
        if self._saved_by_us:
            load_checkpoint(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        # The optimizer, which a further train() would use, has moments of other sets than the best model's.
        for _, layer in sparse_layers(self.model):
            unwrap_optimizer(self.optimizer).state.pop(layer.values, None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The base class uploads the output directory, after copying the files it knows into it.
        for name in OUR_FILES:
            source = os.path.join(checkpoint_folder, name)
            if self.is_world_process_zero() and os.path.isfile(source):
                shutil.copy(source, os.path.join(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)


class TopKastTrainer(TopKastTrainerMixin, Trainer):
    """
    `transformers.Trainer` for models that [`sparsify`] has made sparse; takes the same arguments.

    Example:

    ```python
    model = sparsify(model, density=0.2)
    TopKastTrainer(model=model, args=training_args, train_dataset=dataset).train()
    ```
    """

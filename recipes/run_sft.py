"""
Fine-tunes a pretrained causal language model on conversations or texts with TRL, sparse with Top-KAST or dense.

    accelerate launch recipes/run_sft.py recipes/finetune/chat.yaml [--field value ...]

The YAML file holds any fields of `SftArguments` below, of `FineTuningArguments` in arguments.py, of
`hf_topkast.TopKastConfig` and of `trl.SFTConfig`; the command line wins over it. `output_dir` then holds the model and
its tokenizer, `results.json`, a model card, and checkpoints from which `--resume` goes on.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from arguments import FineTuningArguments, parse_arguments, refuse_missing_directory
from callbacks import Costs, Progress, Stopwatch
from fine_tuning import (
    PROMPT_TOKENS,
    Stages,
    autocast,
    calibration_arguments,
    load_dense,
    settle_fine_tuning,
    teacher_arguments,
    tokens_per_second,
    weight_file_bytes,
)
from model_checks import check_causal, check_length
from results import describe_environment, format_table, measure_model, write_results
from rows import encode, hold_out, load_rows
from run_clm import find_checkpoint
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from vocabulary import load_tokenizer

from hf_topkast import TopKastConfig, TopKastDistillationMixin, TopKastTrainerMixin, sparsify, sparsity_report


@dataclass
class SftArguments:
    """Which model, and rows of what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Dense model of the hub or a directory."})
    sparse: bool = field(default=True, metadata={"help": "Train with Top-KAST; false is the dense baseline."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local file of JSON lines, with `messages` or `text` in each row."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a data set of the hub."})
    held_out: int = field(default=100, metadata={"help": "Rows at the end to count the perplexity on, not to train."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in `output_dir`."})

    def __post_init__(self):
        for name in ("model_name_or_path", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: give it in the YAML file or on the command line.")
        refuse_missing_directory("model_name_or_path", self.model_name_or_path)
        if self.held_out < 1:
            raise ValueError(f"`held_out` is {self.held_out}: give at least one row to count the perplexity on.")


class SparseSFTTrainer(TopKastTrainerMixin, SFTTrainer):
    """TRL's trainer for a sparse model."""


class DistilledSFTTrainer(TopKastDistillationMixin, SFTTrainer):
    """TRL's trainer for a sparse model with a teacher."""


def main(argv: list[str] | None = None) -> dict:
    """
    Runs the recipe.

    Args:
        argv (`list[str]`, *optional*): The command line. Defaults to that of the process.

    Returns:
        `dict`: What `results.json` holds.
    """
    argv = sys.argv[1:] if argv is None else argv
    dataclasses = (SftArguments, FineTuningArguments, TopKastConfig, SFTConfig)
    sft_args, tuning, topkast_config, training_args = parse_arguments(argv, dataclasses)
    settle_fine_tuning(tuning, topkast_config, sft_args.sparse, sft_args.model_name_or_path)
    checkpoint = find_checkpoint(training_args, sft_args.resume)

    tokenizer = load_tokenizer(sft_args.model_name_or_path)
    rows = load_rows(sft_args.dataset, sft_args.dataset_split, tokenizer)
    train, held_out = hold_out(rows, sft_args.held_out)

    def tokens_of(row: dict) -> Tensor:
        return encode(row, tokenizer, training_args.max_length)

    texts = [tokens_of(row) for row in held_out]
    if all(len(ids) < 2 for ids in texts):
        raise ValueError(
            f"The {len(texts):,} rows held out have no token after a first one, so no perplexity can be counted on "
            "them. Raise `held_out` or `max_length`, or look at the last rows of the data set."
        )
    model = load_dense(sft_args.model_name_or_path).to(training_args.device)
    check_length(model, "max_length", training_args.max_length)
    check_causal(model, sft_args.model_name_or_path, training_args.max_length)

    def measure() -> dict[str, float]:
        with autocast(training_args):
            found = perplexity(model, texts)
        return {"perplexity": found, "state_bytes": sparsity_report(model).trainable_state_bytes}

    def time_generation() -> dict[str, float]:
        return {"generate_tokens_per_second": tokens_per_second(model, texts[0][:PROMPT_TOKENS], training_args)}

    stages = Stages(training_args.output_dir, resumed=checkpoint is not None)
    stages.note("before", lambda: measure() | time_generation())
    if sft_args.sparse:
        sparsify(model, topkast_config, **calibration_arguments(tuning, train, tokens_of, checkpoint is not None))
        stages.note("at_cut", measure)
    if training_args.process_index == 0:
        stages.write()

    sparse_trainer = DistilledSFTTrainer if tuning.teacher else SparseSFTTrainer
    trainer = (sparse_trainer if sft_args.sparse else SFTTrainer)(
        model=model,
        args=training_args,
        train_dataset=train,
        processing_class=tokenizer,
        **teacher_arguments(tuning, sft_args.model_name_or_path),
    )
    stopwatch, costs = Stopwatch(), Costs()
    trainer.add_callback(stopwatch)
    trainer.add_callback(costs)
    Progress.take_over(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    results = {"dataset": sft_args.dataset, **measure_model(model), **stages.values, **measure()}
    results["peak_state_bytes"] = costs.peak_state_bytes
    results["weight_file_bytes"] = weight_file_bytes(training_args.output_dir)
    if not trainer.is_fsdp_enabled:  # which spreads the weights over processes: no model to generate with
        results |= time_generation()
    results |= {"steps": trainer.state.global_step, "train_seconds": stopwatch.seconds, "seed": training_args.seed}
    results |= {**describe_environment(), "command": argv}
    if trainer.is_world_process_zero():
        write_results(training_args.output_dir, results, sft_args, topkast_config, script="run_sft.py")
        print(format_table(results))
    return results


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: list[Tensor]) -> float:
    """Of a token, over all tokens of the texts but the first of each. Each process counts all of them."""
    model.eval()
    nats, count = 0.0, 0
    for ids in texts:
        predicted = len(ids) - 1
        if predicted > 0:
            ids = ids[None].to(model.device)
            nats += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * predicted
            count += predicted
    return math.exp(nats / count)


if __name__ == "__main__":
    main()

"""
Trains a causal language model, new or pretrained, sparse with Top-KAST or dense, evaluates it, and writes down what
came out.

    accelerate launch recipes/run_clm.py recipes/enwik8/demo.yaml [--field value ...]

The YAML file holds any fields of the dataclasses in arguments.py, of `hf_topkast.TopKastConfig` and of
`transformers.TrainingArguments`; the command line wins over it. `output_dir` then holds the model and its tokenizer,
`results.json`, a model card, what each layer did (`topkast_layers.jsonl`), and checkpoints from which `--resume` goes
on. What a pretrained model was worth before, dense and right after the cut, is written down, too.
"""

import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
from arguments import ModelArguments, parse_arguments, refuse_unknown_keys
from callbacks import Costs, Progress, Stopwatch
from data import Corpus, Split, load_corpus
from fine_tuning import (
    PROMPT_TOKENS,
    Stages,
    calibration_arguments,
    evaluate,
    load_dense,
    settle_fine_tuning,
    teacher_arguments,
    tokens_per_second,
    weight_file_bytes,
)
from metrics import BitsPerByte, WordPerplexity, make_compute_metrics, token_nats
from model_checks import check_causal, check_length
from results import count_training_flops, describe_environment, format_table, measure_model, write_results
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging
from windows import EvaluationWindows, TrainingWindows

from hf_topkast import TopKastDistillationTrainer, TopKastLayerLogger, TopKastTrainer, sparsify, sparsity_report
from hf_topkast.checkpoints import last_whole_checkpoint


logger = logging.get_logger("recipes.run_clm")


def main(argv: list[str] | None = None) -> dict:
    """
    Runs the recipe.

    Args:
        argv (`list[str]`, *optional*): The command line. Defaults to that of the process.

    Returns:
        `dict`: What `results.json` holds.
    """
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, run_args, topkast_config, training_args, tuning = parse_arguments(argv)
    pretrained = model_args.model_name_or_path
    settle_fine_tuning(tuning, topkast_config, model_args.sparse, pretrained)
    checkpoint = find_checkpoint(training_args, run_args.resume)
    prepare_for_evaluation(training_args)

    # Data: one process tokenizes, the others find its work in the cache.
    with training_args.main_process_first(desc="tokenizing"):
        corpus = load_corpus(data_args)
    cut = {"window": data_args.window, "start_token": corpus.start_token}
    train_windows = TrainingWindows(corpus.splits["train"].tokens, split_name="train", **cut)
    eval_windows = {
        name: EvaluationWindows(corpus.splits[name].tokens, split_name=name, **cut) for name in ("valid", "test")
    }

    metric = "word_perplexity" if data_args.dataset == "wikitext103" else "bits_per_byte"

    # Model: initialised dense, so that a sparse and a dense run of one seed start from the same weights.
    set_seed(training_args.seed)
    model = build_model(model_args, corpus, data_args.window)

    def measure() -> dict[str, float]:
        found = evaluate(model, eval_windows["valid"], metric_for(metric, corpus.splits["valid"]), training_args)
        return {f"valid_{metric}": found[metric], "state_bytes": sparsity_report(model).trainable_state_bytes}

    def time_generation() -> dict[str, float]:
        prompt = corpus.splits["valid"].tokens[: min(PROMPT_TOKENS, data_args.window // 2)].astype("int64")
        return {"generate_tokens_per_second": tokens_per_second(model, torch.from_numpy(prompt), training_args)}

    stages = Stages(training_args.output_dir, resumed=checkpoint is not None)
    if pretrained:
        model.to(training_args.device)
        stages.note("before", lambda: measure() | time_generation())
    if model_args.sparse:
        calibration = calibration_arguments(tuning, train_windows, itemgetter("input_ids"), checkpoint is not None)
        sparsify(model, topkast_config, **calibration)
        if pretrained:
            stages.note("at_cut", measure)
    if pretrained and training_args.process_index == 0:
        stages.write()

    sparse_trainer = TopKastDistillationTrainer if tuning.teacher else TopKastTrainer
    trainer = (sparse_trainer if model_args.sparse else Trainer)(
        model=model,
        args=training_args,
        train_dataset=train_windows,
        eval_dataset=eval_windows["valid"],
        data_collator=default_data_collator,
        processing_class=corpus.tokenizer,
        preprocess_logits_for_metrics=token_nats,
        compute_metrics=metric_for(metric, corpus.splits["valid"]),
        **teacher_arguments(tuning, pretrained),
    )
    stopwatch, costs = Stopwatch(), Costs()
    trainer.add_callback(stopwatch)
    trainer.add_callback(costs)
    Progress.take_over(trainer)
    if model_args.sparse:
        trainer.add_callback(TopKastLayerLogger())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    results = {"dataset": data_args.dataset, "window": data_args.window}
    for name, windows in eval_windows.items():
        split = corpus.splits[name]
        trainer.compute_metrics = metric_for(metric, split)
        measured = trainer.evaluate(windows, metric_key_prefix=name)
        results[f"{name}_{metric}"] = measured[f"{name}_{metric}"]
        results |= {f"{name}_bytes": split.num_bytes, f"{name}_words": split.num_words}
    trainer.save_state()
    results |= measure_model(model) | {"peak_state_bytes": costs.peak_state_bytes}
    if pretrained:
        results |= stages.values | {"weight_file_bytes": weight_file_bytes(training_args.output_dir)}
        if not trainer.is_fsdp_enabled:  # which spreads the weights over processes: no model to generate with
            results |= time_generation()
    tokens, steps = trainer.state.num_input_tokens_seen, trainer.state.global_step
    results |= {
        "tokens": tokens,
        "steps": steps,
        "train_seconds": stopwatch.seconds,
        **count_training_flops(model, tokens, costs.flops_per_weight / max(1, steps)),
        "seed": training_args.seed,
        "data_fingerprint": corpus.fingerprint,
        **describe_environment(),
        "command": argv,
    }
    if trainer.is_world_process_zero():
        write_results(training_args.output_dir, results, model_args, topkast_config)
        print(format_table(results))
        print(f"\n{metric}: valid {results[f'valid_{metric}']:.4f}, test {results[f'test_{metric}']:.4f}")
        if run_args.sample_tokens and not trainer.is_fsdp_enabled:
            print(sample_text(model, corpus, data_args.window, run_args.sample_prompt_tokens, run_args.sample_tokens))
    return results


def find_checkpoint(training_args: TrainingArguments, resume: bool) -> str | bool | None:
    """
    What to go on from: with `resume` the last checkpoint in `output_dir` that was written to its end, else what
    `resume_from_checkpoint` says. A run that goes on from nothing is told of checkpoints that lie in its folder.

    Raises:
        `ValueError`: If there is none to resume from.
    """
    folder = Path(training_args.output_dir)
    if not resume and training_args.resume_from_checkpoint:
        return training_args.resume_from_checkpoint
    checkpoint = last_whole_checkpoint(folder)
    if resume and checkpoint is None:
        raise ValueError(
            f"`--resume`: there is no checkpoint in `output_dir` `{folder}`. Leave `--resume` out to start from the "
            "beginning, or give the `output_dir` of the run to go on with."
        )
    if checkpoint is not None and not resume:
        logger.warning(
            f"This run starts from the beginning, and {checkpoint} is of an earlier one: should this run stop before "
            "that step, `--resume` would go on with the earlier one. Delete it, or give another `output_dir`."
        )
    return checkpoint if resume else None


def prepare_for_evaluation(training_args: TrainingArguments) -> None:
    """Settings that the evaluation relies on; a `ValueError` if the user's contradict it."""
    if training_args.dataloader_drop_last:
        raise ValueError("`dataloader_drop_last` would leave out tokens in evaluation: set it to false.")
    # Metrics are added up batch by batch, so that nothing is stored but one number a window.
    training_args.batch_eval_metrics = True
    # Counts over resumed runs and any number of processes.
    training_args.include_num_input_tokens_seen = "all"


def build_model(args: ModelArguments, corpus: Corpus, window: int) -> PreTrainedModel:
    """
    A new model that fits the corpus, or a pretrained one after a check that it does.

    Args:
        args ([`ModelArguments`]): Architecture and sizes, or the pretrained model's name.
        corpus ([`Corpus`]): Gives the vocabulary.
        window (`int`): The longest input.

    Raises:
        `ValueError`: If a field is not one of the architecture's, or if the model is too small, was sparse before or
            sees tokens that come later.
    """
    vocab_size = len(corpus.tokenizer)
    if args.model_name_or_path:
        model = load_dense(args.model_name_or_path)
    else:
        overrides = args.config_overrides or {}
        fields = AutoConfig.for_model(args.model_type)
        names = {*fields.to_dict(), *fields.attribute_map}
        refuse_unknown_keys(list(overrides), names, f"config_overrides of a {args.model_type}")
        ids = {"bos_token_id": corpus.tokenizer.bos_token_id, "eos_token_id": corpus.tokenizer.eos_token_id}
        sizes = {"vocab_size": vocab_size, "max_position_embeddings": window}
        config = AutoConfig.for_model(args.model_type, **ids, **(sizes | overrides))
        model = AutoModelForCausalLM.from_config(config)
        model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning, where a name does not tell
    known = len(model.get_input_embeddings().weight)
    if known < vocab_size:
        way = "Give `tokenizer` the name of the model's own."
        raise ValueError(
            f"`{args.model_name_or_path or args.model_type}` knows {known:,} tokens, but the tokenizer has "
            f"{vocab_size:,}. {way if args.model_name_or_path else 'Leave `vocab_size` out of `config_overrides`.'}"
        )
    check_length(model, "window", window)
    check_causal(model, args.model_name_or_path or args.model_type, window)
    return model


def metric_for(name: str, split: Split) -> Callable:
    """The `compute_metrics` that counts this split in `bits_per_byte` or in `word_perplexity`."""
    if name == "word_perplexity":
        return make_compute_metrics(WordPerplexity(keep_in_memory=True), len(split.tokens), num_words=split.num_words)
    return make_compute_metrics(BitsPerByte(keep_in_memory=True), len(split.tokens), num_bytes=split.num_bytes)


def sample_text(model: PreTrainedModel, corpus: Corpus, window: int, prompt_tokens: int, new_tokens: int) -> str:
    """
    The first tokens of the valid split and what the model makes of them, for printing. Past its window it goes on from
    the last half of what it has read.
    """
    prompt_tokens = min(prompt_tokens, window // 2)
    prompt = torch.from_numpy(corpus.splits["valid"].tokens[:prompt_tokens].astype("int64"))[None].to(model.device)
    model.eval()
    text = prompt
    while (missing := prompt_tokens + new_tokens - text.shape[1]) > 0:
        read = text[:, -(window // 2) :]
        output = model.generate(
            read,
            attention_mask=torch.ones_like(read),
            max_new_tokens=min(missing, window - read.shape[1]),
            do_sample=True,
            top_p=0.95,
            pad_token_id=corpus.start_token,
        )
        if output.shape[1] == read.shape[1]:
            break
        text = torch.cat([text, output[:, read.shape[1] :]], dim=1)
        if output[0, -1] == corpus.tokenizer.eos_token_id:  # the text is over
            break
    sample = corpus.tokenizer.decode(text[0, prompt_tokens:])
    return f"\nprompt: {corpus.tokenizer.decode(prompt[0])}\nsample: {sample}"


if __name__ == "__main__":
    main()

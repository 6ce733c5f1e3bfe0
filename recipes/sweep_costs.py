"""What a sweep will cost: training FLOPs from the settings, and hours where finished runs say how fast it goes."""

from pathlib import Path

import torch
from results import count_met_weights, count_multiplied_weights
from sweep_plan import Row, Run, Sweep, parse_run
from transformers import AutoConfig, AutoModelForCausalLM
from vocabulary import load_tokenizer

from hf_topkast.checkpoints import last_whole_checkpoint
from hf_topkast.sets import Timetable
from hf_topkast.sets.schedule import backward_density_of, scheduled_density
from hf_topkast.surgery.targets import find_targets


BYTES = 256  # the vocabulary where there is no tokenizer
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # the defaults may lie outside the vocabulary
MOMENTS = 200  # of a density schedule that are looked at


def estimate_training_flops(run: Run) -> float | None:
    """
    Training FLOPs of a run before it has run, counted as [`count_training_flops`] does.

    Sets change at refreshes only and densities may be overridden for single layers, both of which are left out. `None`
    where settings do not tell: without `max_steps`, or with `density: nonzero`.
    """
    model_args, data_args, _, topkast, training, _ = parse_run(run)
    steps = training.max_steps
    if steps <= 0 or (model_args.sparse and topkast.density == "nonzero"):
        return None
    tokens = steps * training.per_device_train_batch_size * training.gradient_accumulation_steps * data_args.window
    with torch.device("meta"):
        if model_args.model_name_or_path:
            config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        else:
            vocabulary = len(load_tokenizer(data_args.tokenizer)) if data_args.tokenizer else BYTES
            sizes = {"vocab_size": vocabulary, "max_position_embeddings": data_args.window} | NO_SPECIAL_TOKENS
            config = AutoConfig.for_model(model_args.model_type, **(sizes | (model_args.config_overrides or {})))
        model = AutoModelForCausalLM.from_config(config)
    _, linear = count_multiplied_weights(model)
    if not model_args.sparse:
        return 6.0 * linear * tokens
    targets = find_targets(model, topkast).values()
    projections = sum(count_met_weights(model, x.weight.numel(), getattr(x, "experts", None)) for x in targets)
    timetable = Timetable.of(topkast, steps)
    flops = 0.0  # of a weight of the sparse layers, a token
    for moment in range(MOMENTS):
        step = (moment + 0.5) / MOMENTS * steps
        density = scheduled_density(topkast.density, timetable.way_left(step), topkast)
        backward = backward_density_of(density, topkast, exploring=timetable.explores(step))
        flops += (4 * density + 2 * backward) / MOMENTS
    return tokens * (flops * projections + 6 * (linear - projections))


def describe_costs(sweep: Sweep, rows: list[Row], finished: dict[Path, dict]) -> str:
    """
    A line for each run: its state, what it is estimated to cost, and at the end what is left.

    Hours go by the seconds per FLOP of the finished runs of the same row, or else of all.
    """
    lines, left_flops, left_hours, unknown = [], 0.0, 0.0, False
    for row in rows:
        flops = estimate_training_flops(sweep.first_runs(row)[0])
        speed = _seconds_per_flop(sweep, [row], finished) or _seconds_per_flop(sweep, sweep.rows, finished)
        hours = None if flops is None or speed is None else flops * speed / 3600
        cost = ("" if flops is None else f"{flops:9.3g} FLOPs") + ("" if hours is None else f"{hours:8.2f} h")
        wanted = sweep.wanted_runs(row, finished)
        names = [(run.name, _state(run, finished)) for run in wanted]
        later = sweep.total_runs(row, finished) - len(wanted)
        names += [(f"{row.name}, best {sweep.tune}, seed {seed}", "later") for seed in sweep.seeds[1:] if later]
        for name, state in names:
            lines.append(f"{state:<9} {cost or 'cost unknown':<24} {name}")
            if state != "done":
                left_flops, left_hours = left_flops + (flops or 0), left_hours + (hours or 0)
                unknown = unknown or hours is None
    done = sum(line.startswith("done") for line in lines)
    hours = "hours are known once a run is done" if unknown else f"{left_hours:.1f} hours one after the other"
    return "\n".join([*lines, f"{done} of {len(lines)} runs done; left: {left_flops:.3g} training FLOPs, {hours}."])


def _state(run: Run, finished: dict[Path, dict]) -> str:
    if run.folder in finished:
        return "done"
    return "half done" if last_whole_checkpoint(run.folder) else "to do"


def _seconds_per_flop(sweep: Sweep, rows: list[Row], finished: dict[Path, dict]) -> float | None:
    runs = [run for row in rows for run in sweep.wanted_runs(row, finished) if run.folder in finished]
    flops = sum(finished[run.folder]["training_flops"] for run in runs)
    return sum(finished[run.folder]["train_seconds"] for run in runs) / flops if flops else None

"""What a run leaves behind: `results.json`, a model card and a table."""

import dataclasses
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from arguments import ModelArguments
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_topkast
from hf_topkast import TopKastConfig, sparsity_report
from hf_topkast.layers import TopKastLayer, expert_stacks
from hf_topkast.method import describe_method


# What is measured of a pretrained model, and when: a column's title, and how its keys end.
STAGES = {"before": "_before", "at the cut": "_at_cut", "after": ""}


def measure_model(model: PreTrainedModel) -> dict[str, Any]:
    """
    Sizes and densities of a trained model, sparse or dense, as they are and not as they were asked for.

    Returns:
        `dict[str, Any]`: `density` and `backward_density` over the sparse layers (1 for a dense model);
        `nonzero_parameters` that the forward pass uses, of `parameters` that the dense model has; `state_bytes`,
        the model's parameters, gradients and Adam moments, and `dense_state_bytes`, those of the dense model.
    """
    report = sparsity_report(model)
    return {
        "density": report.density,
        "backward_density": report.backward_density,
        "nonzero_parameters": report.nonzero_parameters,
        "parameters": report.total_parameters,
        "state_bytes": report.trainable_state_bytes,
        "dense_state_bytes": report.dense_state_bytes,
    }


def count_training_flops(model: PreTrainedModel, tokens: int, flops_per_weight: float = 6.0) -> dict[str, int]:
    """
    FLOPs of the whole training, of this model and of the dense one.

    Counted are the products with weights of linear layers (the head too, an embedding's look-up not): for each token 2
    FLOPs a weight forward, 2 for the gradient of the input, 2 for that of the weight. A sparse layer needs the first
    two of its A and the last of its B. Of experts those count that a token comes to. Not counted are attention's
    products of activations, biases, norms, the optimizer, evaluation, recomputation, and gradients that a method wants
    only to choose weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): Sparse or dense.
        tokens (`int`): Seen in training.
        flops_per_weight (`float`): Of a token, for each weight of the sparse layers, as [`Costs`] counts them, mean
            over the steps.

    Returns:
        `dict[str, int]`: `training_flops` and `dense_training_flops`.
    """
    sparse, dense = count_multiplied_weights(model)
    return {
        "training_flops": round(tokens * (flops_per_weight * sparse + 6 * dense)),
        "dense_training_flops": 6 * tokens * (sparse + dense),
    }


def count_multiplied_weights(model: PreTrainedModel) -> tuple[int, int]:
    """
    The weights of the sparse layers, as the dense model has them, and those of all other linear layers. Of experts
    those that a token comes to, as many as `num_experts_per_tok` says.
    """
    sparse = sum(count_met_weights(model, row.weights, row.experts) for row in sparsity_report(model).rows)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    dense = sum(module.weight.numel() for module in linear if not isinstance(module, TopKastLayer))
    stacks = expert_stacks(model).values()
    return sparse, dense + sum(count_met_weights(model, stack.weight.numel(), stack.experts) for stack in stacks)


def count_met_weights(model: PreTrainedModel, weights: int, experts: int | None) -> int:
    """How many of a layer's weights a token meets: of experts (`None`: it has none) a share, else all."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", experts)
    return weights if experts is None else weights * chosen // experts


def describe_environment() -> dict[str, Any]:
    """Versions, the device, and the commit of the checkout that this file is in (`None` outside one)."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_topkast": hf_topkast.__version__,
    }
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"versions": versions, "device": device, "git_commit": current_commit()}


def current_commit() -> str | None:
    """The commit that is checked out where this file is, or `None` outside a checkout or without git."""
    if Path(__file__).parents[1].joinpath("__init__.py").is_file():
        return None  # installed with the package: a checkout around it would be somebody else's
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def format_table(results: dict[str, Any]) -> str:
    """
    The single values of the results as plain text, a line each; where there are values of before training, they, those
    at the cut and those of after it stand side by side at the end.
    """
    staged = [key for key in results if f"{key}_before" in results]
    apart = {f"{key}{suffix}" for key in staged for suffix in STAGES.values()}
    rows = {
        key: value
        for key, value in results.items()
        if not isinstance(value, dict | list) and value is not None and key not in apart
    }
    width = max(map(len, [*rows, *staged]))
    lines = [f"{key:<{width}}  {_format(value)}" for key, value in rows.items()]
    if staged:
        lines += ["", f"{'':<{width}}" + "".join(f"  {stage:>15}" for stage in STAGES)]
    for key in staged:
        values = (results.get(f"{key}{suffix}") for suffix in STAGES.values())
        lines.append(f"{key:<{width}}" + "".join(f"  {'' if v is None else _format(v):>15}" for v in values))
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def write_results(
    folder: str,
    results: dict[str, Any],
    model_args: ModelArguments,
    topkast_config: TopKastConfig,
    script: str = "run_clm.py",
) -> None:
    """Writes `README.md`, the model card, and then `results.json` into `folder`: the latter whole or not at all."""
    path = Path(folder)
    kind = "sparse" if model_args.sparse else "dense"
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["hf_topkast", kind])
    origin = model_args.model_name_or_path or f"a new {model_args.model_type} model"
    lines = [
        f"---\n{data.to_yaml()}\n---\n\n# {path.resolve().name}\n",
        f"A {kind} causal language model, trained from {origin} on `{results['dataset']}` with `recipes/{script}`.",
    ]
    if model_args.sparse:
        lines.append(
            f"Trained with hf_topkast, {describe_method(topkast_config.method)}: at the end the projections of the "
            f"decoder blocks have {results['density']:.1%} of their weights in the forward pass and "
            f"{results['backward_density']:.1%} in the backward pass; everything else is dense."
        )
    lines.append(f"\n```\n{format_table(results)}\n```\n")
    if model_args.sparse:
        settings = json.dumps(dataclasses.asdict(topkast_config), indent=2)
        lines.append(f"Settings of Top-KAST:\n\n```json\n{settings}\n```\n")
    lines.append(f"Command: `{script} {' '.join(results['command'])}`\n")
    ModelCard("\n".join(lines)).save(path / "README.md")
    temporary = path / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path / "results.json")

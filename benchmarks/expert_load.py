"""
Whether experts that are rarely chosen learn less: the sets of a sparse mixture's experts, beside their load.

    python -m benchmarks.expert_load RUN/checkpoint-500 RUN TEXT [--bytes 65536] [--json FILE]

Both are checkpoints of one training of a byte model (recipes/enwik8/cpu/moe_80_60.yaml), the earlier one first. The
experts of all sparse layers are put in order of load, the tokens of TEXT that come to them over an even share, and cut
into quarters. Of each: its load; how much of A was exchanged between the two; how much of what lay outside B at first
has been in A since; and the root mean square of the weights in A, over the mean of its layer.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_topkast.layers import TopKastGroupedLinear
from hf_topkast.storage.pattern import unpack_bits

from .measure import machine


def grouped_layers(model: PreTrainedModel) -> dict[str, TopKastGroupedLinear]:
    """The sparse layers of experts, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TopKastGroupedLinear)}


@torch.no_grad()
def loads(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    How many tokens come to each expert, over what an even share would be: (experts,) for each layer.

    Args:
        model ([`~transformers.PreTrainedModel`]): a sparse mixture of experts.
        tokens (`torch.Tensor`): int64, (windows, tokens).
    """
    counts = {name: torch.zeros(layer.experts) for name, layer in grouped_layers(model).items()}

    def see(name: str, ends: torch.Tensor):
        counts[name] += ends.diff(prepend=ends.new_zeros(1))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[1]))
        for name, layer in grouped_layers(model).items()
    ]
    for part in tokens.split(16):
        model(part)
    for hook in hooks:
        hook.remove()
    return {name: count / count.mean() for name, count in counts.items()}


def measure(early: PreTrainedModel, late: PreTrainedModel, tokens: torch.Tensor) -> list[dict[str, float]]:
    """One row for each expert of each layer."""
    rows, load, before = [], loads(late, tokens), grouped_layers(early)
    for name, layer in grouped_layers(late).items():
        old, new = before[name].active_mask.flatten(1), layer.active_mask.flatten(1)
        unvisited = unpack_bits(layer.unvisited, new.numel()).view(layer.experts, -1).sum(1)
        outside = layer.initial_reservoir_size.item() / layer.experts
        size = (layer.weight.flatten(1).square().sum(1) / new.sum(1)).sqrt()
        columns = load[name], (old & ~new).sum(1) / old.sum(1), 1 - unvisited / outside, size / size.mean()
        names = ("load", "exchanged", "reservoir use", "size of A")
        rows += [{"layer": name, **dict(zip(names, row))} for row in zip(*(column.tolist() for column in columns))]
    return rows


def quarters(rows: list[dict]) -> list[dict[str, float]]:
    """The means of four equal parts of the rows, in order of load."""
    rows = sorted(rows, key=lambda row: row["load"])
    parts = [rows[index * len(rows) // 4 : (index + 1) * len(rows) // 4] for index in range(4)]
    keys = [key for key in rows[0] if key != "layer"]
    return [{key: sum(row[key] for row in part) / len(part) for key in keys} for part in parts]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("early", type=Path)
    parser.add_argument("late", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bytes", type=int, default=65536, help="From the end of TEXT.")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with args.text.open("rb") as file:
        file.seek(-args.bytes, 2)
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    tokens = tokens[: len(tokens) // args.window * args.window].view(-1, args.window)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (args.early, args.late)]
    rows = measure(*models, tokens)
    print("| quarter | " + " | ".join(key for key in rows[0] if key != "layer") + " |")
    for number, row in enumerate(quarters(rows), 1):
        print(f"| {number} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()

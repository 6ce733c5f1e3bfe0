"""
Live bytes after a training step, sparse against dense AdamW, and what `sparsity_report` states.

    python -m benchmarks.memory [--width 512] [--layers 4] [--json FILE]

Live bytes are those of every tensor that lives between steps: parameters, gradients, optimizer state, indices and
reservoir. Those of activations are the same for both and not counted; those of a reservoir on disk are not memory.

    python -m benchmarks.memory --device cuda --bf16 --model 1B --batch 8

On a GPU they are the bytes there, so a reservoir in host memory does not count, and `peak` is the most that torch has
allocated in a step with its refresh, activations and all.
"""

import argparse
import gc

import torch

from hf_topkast import TopKastController, sparsify, sparsity_report
from hf_topkast.surgery import sparse_layers

from .measure import add_model, make_gpt2, make_parser, report


SETTINGS = [(0.2, 0.4), (0.1, 0.2), (0.05, 0.1)]
PLACES = {"same": "memory", "cpu": "host", "disk": "disk"}


def live_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that model, gradients and optimizer hold in the device's memory, each once."""
    device = model.device.type
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    tensors += [layer.reservoir for _, layer in sparse_layers(model) if layer.reservoir_device == "cpu"]
    tensors = [t for t in tensors if t.device.type == device]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def after_two_steps(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Trains two steps, the second with a refresh at its end; live MiB before the refresh, and on a GPU the peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # as Trainer does
    if next(sparse_layers(model), None):
        TopKastController(model, optimizer)
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.context), device=args.device)
    found = {}
    for _ in range(2):  # the first makes the optimizer's state
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        found["live"] = live_bytes(model, optimizer) / 2**20
        optimizer.step()
    if args.device == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    add_model(parser, layers=4, width=512, vocabulary=256, context=64, batch=2)
    args = parser.parse_args()

    def model():
        return make_gpt2(args.layers, args.width, args.context, args.vocabulary, device=args.device)

    dense = after_two_steps(model(), args)
    rows = []
    for density, backward_density in SETTINGS:
        for place in ("same", "cpu" if args.device == "cuda" else "disk"):
            settings = {"density": density, "backward_density": backward_density, "reservoir_device": place}
            sparse = sparsify(model(), **settings, refresh_every=2)
            stated = sparsity_report(sparse)
            found = after_two_steps(sparse, args)
            del sparse
            gc.collect()  # a controller and its optimizer hold each other
            row = {"density / backward": f"{density} / {backward_density}", "reservoir": PLACES[place]}
            for kind in dense:
                row.update({f"{kind} MiB": found[kind], f"dense {kind} MiB": dense[kind]})
                row[f"{kind} / dense"] = found[kind] / dense[kind]
            rows.append({**row, "stated / dense": stated.trainable_state_bytes / stated.dense_state_bytes})
    report(rows, args, [*(f"{kind} / dense" for kind in dense), "stated / dense"])


if __name__ == "__main__":
    main()

"""
Live bytes after a training step, sparse against dense AdamW, and what `sparsity_report` states.

    python -m benchmarks.memory [--width 512] [--layers 4] [--json FILE]

Live bytes are those of every tensor that lives between steps: parameters, gradients, optimizer state, indices and
reservoir. Those of activations are the same for both and not counted; those of a reservoir on disk are not memory.
"""

import torch

from hf_topkast import TopKastController, sparsify, sparsity_report
from hf_topkast.surgery import sparse_layers

from .measure import make_gpt2, make_parser, report


SETTINGS = [(0.2, 0.4), (0.1, 0.2), (0.05, 0.1)]


def live_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that model, gradients and optimizer hold in memory, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    tensors += [layer.reservoir for _, layer in sparse_layers(model) if layer.reservoir_device == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def after_a_step(model: torch.nn.Module) -> int:
    """Trains one step and counts, with the gradients still there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if next(sparse_layers(model), None):
        TopKastController(model, optimizer)
    tokens = torch.randint(0, model.config.vocab_size, (2, 32))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    return live_bytes(model, optimizer)


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256)
    args = parser.parse_args()

    def model():
        return make_gpt2(args.layers, args.width, positions=64, vocabulary=args.vocabulary)

    dense = after_a_step(model())
    rows = []
    for density, backward_density in SETTINGS:
        for place in ("same", "disk"):
            sparse = sparsify(
                model(), density=density, backward_density=backward_density, reservoir_device=place, refresh_every=100
            )
            stated = sparsity_report(sparse)
            live = after_a_step(sparse)
            rows.append(
                {
                    "density / backward": f"{density} / {backward_density}",
                    "reservoir": "memory" if place == "same" else "disk",
                    "live MiB": live / 2**20,
                    "dense MiB": dense / 2**20,
                    "live / dense": live / dense,
                    "stated / dense": stated.trainable_state_bytes / stated.dense_state_bytes,
                }
            )
    report(rows, args, ["live / dense", "stated / dense"])


if __name__ == "__main__":
    main()

"""
One training step of a pretrained model in one process: dense, LoRA, and sparse at several densities.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.pretrained_step MODEL [--json FILE]

MODEL is a directory of a causal language model. Sets are static (B is A), and chosen by magnitude: how fast a step is
does not depend on how they were chosen. LoRA is r = 16 on all projections. Rounds are interleaved; a ratio is the
median over the rounds of the time of dense over this one's, so above 1 this one is faster: of dense in the same dtype,
and of the faster of dense in fp32 and under bf16 autocast. State is what training holds beside activations: weights,
gradients, two moments, indices and the reservoir.
"""

import statistics
from argparse import Namespace

import torch
from transformers import AutoModelForCausalLM

from hf_topkast import sparsity_report

from .measure import interleaved, make_parser, median_ratio, report
from .pretrained import prepare
from .step_time import Step


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    kinds = {"dense": ("dense", 1.0), "LoRA": ("lora", 1.0)}
    kinds |= {f"density {density}": ("magnitude, static", density) for density in args.densities}
    steps, state = {}, {}
    for name, (run, density) in kinds.items():
        model = make(run, density, args)
        tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.window), device=args.device)
        for bf16 in (False, True):  # one model for both, since autocast leaves its weights as they are
            steps[name, bf16] = Step(model, tokens, bf16)
        state[name] = sparsity_report(model).trainable_state_bytes
    seconds = interleaved(steps, args.rounds, args.device)
    fastest = min((False, True), key=lambda bf16: statistics.median(seconds["dense", bf16]))
    rows = [
        {
            "run": name,
            "dtype": "bf16 autocast" if bf16 else "fp32",
            "seconds": statistics.median(seconds[name, bf16]),
            "dense, same dtype": median_ratio(seconds["dense", bf16], seconds[name, bf16]),
            "fastest dense": median_ratio(seconds["dense", fastest], seconds[name, bf16]),
            "state": state[name] / state["dense"],
        }
        for bf16 in (False, True)
        for name in kinds
    ]
    report(rows, args, ["dense, same dtype", "fastest dense"])


def make(run: str, density: float, args) -> torch.nn.Module:
    """The model of a run, on the device."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    settings = Namespace(exploration=0.0, refresh_every=None, device=args.device)
    return prepare(model, run, density, torch.empty(0), settings).train()


if __name__ == "__main__":
    main()

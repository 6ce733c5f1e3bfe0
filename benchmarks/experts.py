"""
Mixture-of-experts blocks, sparse against the better of transformers' two dense ways, eager and grouped_mm, on a CPU.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.experts step [--json FILE]
    python -m benchmarks.experts generate
    python -m benchmarks.experts memory
    python -m benchmarks.experts refresh [--gigabytes 1]

`step` is forward and backward of one block's experts in float32, each token with as many random experts as are chosen
(without the router, which stays dense). `generate` is a small Mixtral, one token at a time. Rounds are interleaved; a
ratio is the median over the rounds of dense over sparse time, so above 1 sparse is faster. `memory` is live bytes of
training as `sparsity_report` says, next to those of all tensors that live between steps. `refresh` is how far the
process grows in a refresh of a stack of experts, against the bytes of its dense parameter (Linux only).
"""

import gc
import statistics
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_topkast import TopKastController, sparsify, sparsity_report

from .measure import interleaved, make_parser, median_ratio, report
from .memory import live_bytes
from .step_time import pair


DENSE = ("eager", "grouped_mm")
# Experts, their width, that of the model, how many are chosen for a token, and tokens.
SHAPES = [(8, 1792, 1024, 2, 2048), (32, 192, 512, 8, 512)]


def mixtral(experts: int, width: int, hidden: int, chosen: int, layers: int = 1) -> MixtralForCausalLM:
    """A Mixtral with heads of 64 and a small vocabulary, freshly initialised; always the same for the same sizes."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=512,
    )
    return MixtralForCausalLM(config)


def dense_ways(*sizes: int, **kwargs: int) -> dict[str, MixtralForCausalLM]:
    """A dense model for each of transformers' ways."""
    models = {way: mixtral(*sizes, **kwargs) for way in DENSE}
    for way, model in models.items():
        model.set_experts_implementation(way)
    return models


class Step:
    """Forward and backward of the experts of a model's first block."""

    def __init__(self, model: MixtralForCausalLM, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor):
        self.experts, self.inputs = model.model.layers[0].mlp.experts, (experts, weights)
        self.x, self.dy = x.clone().requires_grad_(), torch.randn_like(x)

    def __call__(self):
        self.experts(self.x, *self.inputs).backward(self.dy)
        self.experts.zero_grad()
        self.x.grad = None


def fastest(seconds: dict[str, list[float]]) -> str:
    """The faster dense way."""
    return min((way for way in DENSE if way in seconds), key=lambda way: statistics.median(seconds[way]))


def measure_steps(args) -> list[dict]:
    """A row for each shape and setting."""
    rows = []
    for shape in args.shapes:
        count, width, hidden, chosen, tokens = shape
        x = torch.randn(tokens, hidden)
        index = torch.rand(tokens, count).topk(chosen).indices
        inputs = x, index, torch.rand(tokens, chosen).softmax(-1)
        dense = {way: Step(model, *inputs) for way, model in dense_ways(count, width, hidden, chosen).items()}
        for density, backward_density in args.settings:
            model = sparsify(
                mixtral(count, width, hidden, chosen),
                target_modules=["experts"],
                density=density,
                backward_density=backward_density,
            )
            seconds = interleaved({**dense, "sparse": Step(model, *inputs)}, args.rounds)
            best = fastest(seconds)
            rows.append(
                {
                    "experts, width, hidden, chosen, tokens": ", ".join(map(str, shape)),
                    "density / backward": f"{density} / {backward_density}",
                    **{f"{way} ms": 1e3 * statistics.median(times) for way, times in seconds.items()},
                    "fastest dense": best,
                    "fastest dense / sparse": median_ratio(seconds[best], seconds["sparse"]),
                }
            )
    return rows


def measure_generation(args) -> list[dict]:
    """A row for each setting."""
    count, width, hidden, chosen = args.shapes[0][:4]
    sizes = {"experts": count, "width": width, "hidden": hidden, "chosen": chosen, "layers": args.layers}
    prompt = torch.randint(1, 256, (1, 8))

    def generator(model):
        length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
        mask = torch.ones_like(prompt)
        return lambda: model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length)

    dense = {way: generator(model.eval()) for way, model in dense_ways(**sizes).items()}
    rows = []
    for density, backward_density in args.settings:
        for what, targets in (("all projections", "all-linear"), ("experts", ["experts"])):
            settings = {"density": density, "backward_density": backward_density, "target_modules": targets}
            sparse = sparsify(mixtral(**sizes), **settings).eval()
            seconds = interleaved({**dense, "sparse": generator(sparse)}, args.rounds)
            best = fastest(seconds)
            rows.append(
                {
                    "density / backward": f"{density} / {backward_density}",
                    "sparse": what,
                    **{f"{way} tokens/s": args.new_tokens / statistics.median(s) for way, s in seconds.items()},
                    "fastest dense / sparse": median_ratio(seconds[best], seconds["sparse"]),
                }
            )
    return rows


def measure_memory(args) -> list[dict]:
    """A row for each setting and place of the reservoir."""
    sizes = args.shapes[0][:4]
    tokens = torch.randint(0, 256, (2, 64))

    def after_two_steps(model) -> int:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        controller = TopKastController(model, optimizer) if settings else None
        for _ in range(2):  # the first makes the optimizer's state
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            live = live_bytes(model, optimizer)
            optimizer.step()
        del controller
        return live

    settings = {}
    dense = after_two_steps(mixtral(*sizes))
    rows = []
    for density, backward_density in args.settings:
        for place in ("same", "disk"):
            settings = {"density": density, "backward_density": backward_density, "reservoir_device": place}
            sparse = sparsify(mixtral(*sizes), **settings, refresh_every=2)
            stated = sparsity_report(sparse)
            live = after_two_steps(sparse)
            del sparse
            gc.collect()
            rows.append(
                {
                    "density / backward": f"{density} / {backward_density}",
                    "reservoir": {"same": "memory"}.get(place, place),
                    "dense MiB": dense / 2**20,
                    "live MiB": live / 2**20,
                    "live / dense": live / dense,
                    "stated / dense": stated.trainable_state_bytes / stated.dense_state_bytes,
                }
            )
    return rows


def process_bytes(key: str) -> int:
    """`VmRSS`, what the process has in memory, or `VmHWM`, the most it had since [`forget_peak`]."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak():
    """Has `VmHWM` start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_refresh(args) -> list[dict]:
    """A row for each setting: gate and up of 8 experts are the stack, the down projections stay dense."""
    experts, hidden = 8, 2048
    width = max(1, round(args.gigabytes * 1e9 / (4 * experts * 2 * hidden)))
    rows = []
    for density, backward_density in args.settings:
        settings = {"density": density, "backward_density": backward_density, "refresh_every": 1}
        model = sparsify(mixtral(experts, width, hidden, 2), target_modules=["experts.gate_up_proj"], **settings)
        layer = model.model.layers[0].mlp.experts.gate_up_proj
        optimizer = torch.optim.AdamW([layer.values], lr=1e-3, fused=True)
        controller = TopKastController(model, optimizer)
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
        controller.refresh()  # what is made once is there
        gc.collect()
        forget_peak()
        before = process_bytes("VmRSS")
        controller.refresh()
        peak, stack = process_bytes("VmHWM") - before, 4 * layer.numel
        rows.append(
            {
                "stack MB": stack / 1e6,
                "density / backward": f"{density} / {backward_density}",
                "before the refresh MB": before / 1e6,
                "more at its peak MB": peak / 1e6,
                "more / stack": peak / stack,
                "bytes a weight": peak / layer.numel,
                "seconds": controller.refresh_seconds,
            }
        )
        del model, layer, optimizer, controller
        gc.collect()
    return rows


MEASURES = {
    "step": (measure_steps, ["fastest dense / sparse"]),
    "generate": (measure_generation, ["fastest dense / sparse"]),
    "memory": (measure_memory, ["live / dense", "stated / dense"]),
    "refresh": (measure_refresh, ["more / stack"]),
}


def sizes_of(text: str) -> tuple[int, ...]:
    """`8,1792,1024,2,2048` as five numbers."""
    return tuple(map(int, text.split(",")))


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument(
        "--shapes", nargs="+", type=sizes_of, default=SHAPES, help="experts,width,hidden,chosen,tokens"
    )
    parser.add_argument("--settings", nargs="+", type=pair, default=[(0.2, 0.4), (0.1, 0.2)], help="density/backward")
    parser.add_argument("--layers", type=int, default=4, help="of the model that generates")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the stack that is refreshed")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure, bars = MEASURES[args.measure]
    report(measure(args), args, bars)


if __name__ == "__main__":
    main()

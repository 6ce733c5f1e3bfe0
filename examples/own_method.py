"""A rule of your own for which weights are active: Top-KAST that gives up a weight only for one 20% larger.

python examples/own_method.py [STEPS]
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_topkast import LayerView, TopKastController, register_method, sparsify


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100


@register_method("sticky", explores=True, backward_ratio=2.0)
def sticky(view: LayerView):
    """A and B of one layer as bool masks of exactly `view.size` and `view.backward_size` places."""
    magnitude = view.theta.abs()
    if view.active is not None:  # None when the layer is made sparse
        magnitude = torch.where(view.active, 1.2 * magnitude, magnitude)
    order = magnitude.flatten().argsort(descending=True, stable=True)
    active, backward = (torch.zeros_like(view.theta, dtype=torch.bool) for _ in range(2))
    active.view(-1)[order[: view.size]] = True
    backward.view(-1)[order[: view.backward_size]] = True
    return active, backward


def churn_of(method: str) -> float:
    """Share of A that left it at the last refresh of a short training on a made-up language."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = sparsify(LlamaForCausalLM(config), method=method, density=0.2, refresh_every=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    controller = TopKastController(model, optimizer)
    for _ in range(steps):
        start, stride = torch.randint(64, (2, 8, 1))
        tokens = (start + stride * torch.arange(32)) % 64  # arithmetic progressions: something to learn
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller.mask_churn


for method in ("topkast", "sticky"):
    print(f"{method:>8}: {churn_of(method):.1%} of A left it at the last refresh")

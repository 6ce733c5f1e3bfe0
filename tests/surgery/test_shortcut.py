"""Blocks that are done with are passed by, where that changes nothing."""

import logging
from collections import Counter

import pytest
import torch
from torch import nn
from toy_models import make_gpt2, make_llama, token_batches
from transformers import AutoModelForCausalLM

from hf_topkast import sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.surgery.shortcut import Shortcut


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12, dtype=torch.float64)

    def forward(self, x):
        return x + self.fc(x).tanh()


class Plain(nn.Module):
    """Five residual blocks of one layer each; other models here differ in what they give to whom."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Changed(Plain):
    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            x = block(x).mul_(0.5)
        return x


class Older(Plain):
    """The fourth block reads what the first gave, too."""

    def forward(self, x):
        outputs = [x]
        for place, block in enumerate(self.blocks):
            outputs.append(block(outputs[-1] + (outputs[1] if place == 3 else 0)))
        return outputs[-1]


class Noted(Plain):
    """The last block reads what the first has noted while it ran."""

    def __init__(self):
        super().__init__()
        self.blocks[0].fc.register_forward_hook(lambda layer, args, output: setattr(self, "noted", output))

    def forward(self, x):
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x + self.noted)


class Forgotten(Noted):
    """The same, and what was noted of another batch is not kept."""

    def forward(self, x):
        self.noted = None
        return super().forward(x)


class Wider(Plain):
    """What the first two blocks read and give has another shape than the rest."""

    def forward(self, x):
        pairs = x.unflatten(0, (1, -1))
        for block in self.blocks[:2]:
            pairs = block(pairs)
        (x,) = pairs.unbind()
        for block in self.blocks[2:]:
            x = block(x)
        return x


def thetas(model, batches):
    layers = {"target_modules": ["fc"]} if isinstance(model, Plain) else {}
    sparsify(model, density=0.4, calibration=batches, correct=True, **layers)
    return {name: layer.theta() for name, layer in sparse_layers(model)}


def by_the_whole_way(monkeypatch, model, batches):
    with monkeypatch.context() as patch:
        patch.setattr(Shortcut, "saves", False)
        return thetas(model, batches)


def check_equal(found, expected):
    assert found.keys() == expected.keys() and found
    for name, theta in expected.items():
        torch.testing.assert_close(found[name], theta, rtol=1e-9, atol=1e-12)


def deep(make_model):
    """The toy model with five blocks."""
    config = make_model().config
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double()


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 12, dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.fixture
def said(caplog, monkeypatch):
    """The warnings of the correction so far."""
    monkeypatch.setattr(logging.getLogger("hf_topkast"), "propagate", True)
    return lambda: [record.message for record in caplog.records if "reads more than" in record.message]


@pytest.mark.parametrize("make_model", [make_gpt2, make_llama])
def test_a_transformer_comes_out_as_by_the_whole_way(monkeypatch, said, make_model):
    batches = token_batches(3)
    check_equal(thetas(deep(make_model), batches), by_the_whole_way(monkeypatch, deep(make_model), batches))
    assert not said()


def test_no_block_runs_once_more_for_each_that_follows():
    model, runs = deep(make_llama), Counter()
    for place, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, place=place: runs.update([(place, len(args[0]))]))
    thetas(model, [tokens[: 3 - place] for place, tokens in enumerate(token_batches(2))])
    # For the norms, dense for the Gram matrices, and sparse for what it gives to the next block; and the way of the
    # first batch for the third block and the fifth, of the second for the fourth.
    assert [runs[place, 3] for place in range(5)] == [5, 5, 5, 4, 3]
    assert [runs[place, 2] for place in range(5)] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Plain, Changed, Older, Noted, Forgotten, Wider])
def test_a_model_comes_out_as_by_the_whole_way(monkeypatch, said, kind, count):
    found = thetas(kind(), inputs(count))
    assert len(said()) == (kind not in (Plain, Changed))
    check_equal(found, by_the_whole_way(monkeypatch, kind(), inputs(count)))


def test_one_batch_has_no_shortcut(monkeypatch):
    monkeypatch.setattr(Shortcut, "saves", property(lambda self: pytest.fail("tried") if self.open else False))
    assert thetas(Plain(), inputs(1))


def test_blocks_keep_a_forward_of_their_own(monkeypatch):
    model = Plain()
    own = [block.__dict__.setdefault("forward", block.forward) for block in model.blocks[:3]]
    check_equal(thetas(model, inputs()), by_the_whole_way(monkeypatch, Plain(), inputs()))
    assert [block.__dict__.get("forward") for block in model.blocks] == [*own, None, None]
    assert not any(block._forward_hooks for block in model.blocks)


def test_an_error_on_the_way_leaves_no_trace():
    model = Plain()
    shortcut = Shortcut(model, open=True)
    for place in range(3):
        with shortcut.passing(0, short=False):
            model(inputs()[0])
        shortcut.add(f"blocks.{place}")
    with pytest.raises(ZeroDivisionError), shortcut.passing(0, short=True):
        assert "forward" in vars(model.blocks[0])
        raise ZeroDivisionError
    assert not any("forward" in vars(block) or block._forward_hooks for block in model.blocks)

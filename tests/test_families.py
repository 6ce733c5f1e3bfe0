"""Every causal language model of transformers, from sparsify to densify; docs/families.md lists the outcome."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import FAMILIES, VOCABULARY, make_family
from torch.nn import functional
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_topkast import TopKastTrainer, densify, export_sparse, sparsify
from hf_topkast.layers import TopKastGroupedLinear, TopKastLayer
from hf_topkast.surgery import sparse_layers


PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
# The release that the page is about: others may know more families, or fewer.
RELEASE = re.search(r"transformers ([\d.]+)", PAGE)[1]
INSTALLED = ".".join(transformers.__version__.split(".")[:2])

TOKENS = torch.randint(2, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(0))


def section(title: str) -> str:
    """The text under a heading of the page."""
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> dict[str, list[str]]:
    """The table under a heading: the names in the second column by those in the first."""
    rows = [line.split("|")[1:3] for line in section(title).splitlines() if line.startswith("| `")]
    return {
        name: re.findall(r"`([^`]+)`", second) for first, second in rows for name in re.findall(r"`([^`]+)`", first)
    }


WORK = re.findall(r"`([^`]+)`", section("As they are"))
STACKED = table("With some weights kept dense")
WRITERS = table("That change their weights themselves")
NOT_TRIED = table("Not tried")
KNOWN = {*WORK, *STACKED, *WRITERS, *NOT_TRIED}


def installed(families) -> list[str]:
    return [family for family in families if family in FAMILIES]


def test_the_page_lists_every_family_once():
    tried = [*WORK, *STACKED, *WRITERS]
    assert len([*tried, *NOT_TRIED]) == len(KNOWN)
    assert f"{len(tried)} of {len(KNOWN)}" in PAGE
    if INSTALLED != RELEASE:
        new, gone = sorted(set(FAMILIES) - KNOWN), sorted(KNOWN - set(FAMILIES))
        pytest.xfail(
            f"docs/families.md is about transformers {RELEASE}, and {INSTALLED} is installed, which has "
            f"{len(new)} other families {new} and lacks {gone}; all others are tried."
        )
    assert sorted(KNOWN) == FAMILIES


def logits_of(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens).logits


def check_logits(found: torch.Tensor, expected: torch.Tensor):
    """Equal weights, in other memory: dense products of other alignment add up in another order on some CPUs."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def loss_from(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    return loss_from(model(input_ids=TOKENS), TOKENS)


def check_gradients(model: PreTrainedModel):
    """Every value's gradient is that of its place in the dense model with the same α."""
    model.zero_grad()
    dense = densify(copy.deepcopy(model))
    loss_of(model).backward()
    loss_of(dense).backward()
    parameters = dict(dense.named_parameters())
    for name, layer in sparse_layers(model):
        experts = isinstance(layer, TopKastGroupedLinear)
        expected = parameters[name if experts else f"{name}.weight"].grad
        if expected is None:  # for example cross-attention, without an encoder
            assert layer.values.grad is None, name
        else:
            expected = layer.to_rows(expected).flatten()[layer.pattern.flat_index()]
            torch.testing.assert_close(layer.values.grad, expected, rtol=1e-3, atol=1e-4, msg=name)
    model.zero_grad()


def check_experts(model: PreTrainedModel):
    """No expert stays dense, and no router becomes sparse."""
    for name, module in model.named_modules():
        if "Experts" in type(module).__name__ and not isinstance(module, torch.nn.ModuleList):
            assert not [key for key, parameter in module.named_parameters() if parameter.ndim == 3], name
        path = name.split(".")
        assert not (isinstance(module, TopKastLayer) and {"gate", "router"} & set(path)), name


class SaveOnce(TrainerCallback):
    """After the third step; `save_steps` would save after the last one too."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 3


def make_trainer(model: PreTrainedModel, directory: Path) -> TopKastTrainer:
    """For four steps with a refresh after every second and a checkpoint in between."""
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
    return TopKastTrainer(
        model=model, args=args, train_dataset=data, compute_loss_func=loss_from, callbacks=[SaveOnce()]
    )


def check_resume(model: PreTrainedModel, resumed: PreTrainedModel, directory: Path):
    """Another model, at other weights, goes on from the checkpoint to where the straight run ended, bit for bit."""
    make_trainer(resumed, directory).train(resume_from_checkpoint=str(directory / "checkpoint-3"))
    check_same_layers(model, resumed)
    others = resumed.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, others[key]), key


def check_same_layers(model: PreTrainedModel, loaded: PreTrainedModel):
    layers, others = dict(sparse_layers(model)), dict(sparse_layers(loaded))
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        other = others[name]
        for one, two in (
            (layer.values, other.values),
            (layer.theta(), other.theta()),
            (layer.active_mask, other.active_mask),
            (layer.backward_mask, other.backward_mask),
        ):
            assert torch.equal(one, two), name


STOCK_READER = """
import sys
import torch, transformers
transformers.logging.set_verbosity_error()
tokens = torch.tensor(eval(sys.argv[1]))
for line in sys.stdin:
    kind, place = line.split()
    model = getattr(transformers, kind).from_pretrained(place)
    assert "hf_topkast" not in sys.modules
    torch.save(model(input_ids=tokens).logits.detach(), place + "/read.pt")
    print("read", flush=True)
"""


@pytest.fixture(scope="module")
def stock_reader():
    """Loads a directory without our import and gives the logits; one process for all families, as starting it takes
    longer than reading."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOCK_READER, str(TOKENS.tolist())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def read(model: PreTrainedModel, place: Path) -> torch.Tensor:
        print(type(model).__name__, place, file=process.stdin, flush=True)
        assert process.stdout.readline() == "read\n"
        return torch.load(place / "read.pt")

    yield read
    process.stdin.close()
    process.wait()


@pytest.mark.parametrize("family", installed(WRITERS))
def test_a_model_that_changes_its_weights_is_refused_when_it_runs(family):
    model = sparsify(make_family(family), density=0.3)
    with pytest.raises(RuntimeError, match="name the layer in exclude_modules"):
        for training in (True, False):  # Gemma 3n does it in training, RWKV before evaluation
            logits_of(model.train(training))


TRIED = installed([*WORK, *STACKED, *WRITERS])


# `make test-all` walks with all of them, `make test` with every fourth.
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if place % 4 else ()) for place, name in enumerate(TRIED)]
)
def test_family(family, stock_reader, tmp_path):
    model = make_family(family)
    dense_types = {name: type(module) for name, module in model.named_modules()}
    settings = {"density": 0.3, "refresh_every": 2, "exclude_modules": {**STACKED, **WRITERS}.get(family)}
    if family in STACKED:
        with pytest.raises(ValueError, match=re.escape(f"exclude_modules={STACKED[family]}")):
            sparsify(model, density=0.3)
    sparsify(model, **settings).train()
    check_experts(model)
    check_gradients(model)

    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert trainer.topkast_controller.mask_churn is not None
    check_resume(model, sparsify(make_family(family, seed=1), **settings), tmp_path)

    model.eval()
    logits = logits_of(model)
    generated = model.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=1)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    check_same_layers(model, loaded)
    check_logits(logits_of(loaded), logits)
    assert torch.equal(loaded.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=1), generated)
    check_logits(stock_reader(model, tmp_path / "saved"), logits)

    export_sparse(model, tmp_path / "compact")
    compact = type(model).from_pretrained(tmp_path / "compact")
    check_logits(logits_of(compact), logits)
    for (name, layer), (_, other) in zip(sparse_layers(model), sparse_layers(compact)):
        assert torch.equal(layer.weight, other.weight), name

    densify(model)
    check_logits(logits_of(model), logits)
    for name, module in model.named_modules():
        assert isinstance(module, torch.nn.Linear) or type(module) is dense_types[name], name

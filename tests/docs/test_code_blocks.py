"""
Every code block of README and docs does what it says.

Python blocks of a page run one after the other in one namespace, on tiny local stand-ins for models of the hub; what a
block takes for granted, such as `dataset`, is in `standins.py` or below. Trainings end after a few steps. Shell lines
are not run: the files, modules, verbs and options that they name have to exist.
"""

import ast
import gc
import re

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from code_blocks import DOCS, ROOT, blocks, with_blocks
from standins import STEPS, make_dataset, make_model, make_pruned, namespace, save_standins

from hf_topkast import TopKastController, TopKastTrainer, sparsify
from hf_topkast.method import METHODS
from hf_topkast.surgery import sparse_layers


# What a block writes where a reader puts something of their own.
ELLIPSES = {
    "TrainingArguments(...)": "training_args",
    "train_dataset=...": "train_dataset=dataset",
    ", ...)": ", args=training_args, train_dataset=dataset, eval_dataset=dataset)",
    "n_trials=20": "n_trials=2",
    '.to("cuda")': '.to("cpu")',
}


def is_sparse(model) -> bool:
    return isinstance(model, torch.nn.Module) and any(True for _ in sparse_layers(model))


def prepare(names: dict, source: str):
    """
    Gives a statement the model that it starts from: dense where it calls `sparsify`, pruned where that takes zeros,
    else sparse.
    """
    if re.search(r"sparsify\(\s*model\b|deepcopy\(model\)", source):
        if "model" not in names or is_sparse(names["model"]) or "nonzero" in source:
            names["model"] = make_pruned() if "nonzero" in source else make_model()
    elif "model" not in names and re.search(r"\bmodel\b(?! =)", source):
        names["model"] = sparsify(make_model(), density=0.2)


def prepare_block(names: dict, source: str):
    """What pages without their own have: a sparse model where a block makes none; an optimizer, a trainer."""
    if "accelerator" not in names:
        AcceleratorState._reset_state()  # as in a new process: trainers choose other precisions
    if not re.search(r"sparsify\(|from_pretrained\(|deepcopy\(", source) and not is_sparse(names.get("model")):
        names["model"] = sparsify(make_model(), density=0.2)
    if re.search(r"\btrainer\.", source) and "trainer = " not in source and "trainer" not in names:
        args, data = names["training_args"], names["dataset"]
        names["trainer"] = TopKastTrainer(model=names["model"], args=args, train_dataset=data)
    if (
        re.search(r"\boptimizer\b", source)
        and not re.search(r"^optimizer = ", source, re.M)
        and "controller" not in names
    ):
        names["optimizer"] = torch.optim.AdamW(names["model"].parameters(), lr=1e-3)
        if "TopKastController(" not in source:
            names["controller"] = TopKastController(names["model"], names["optimizer"])


def fill(source: str) -> str:
    for dots, instead in ELLIPSES.items():
        source = source.replace(dots, instead)
    return source


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Trainings of a few steps on the CPU, in an empty directory; what blocks register is taken back."""
    monkeypatch.chdir(tmp_path)
    complete = transformers.TrainingArguments.__post_init__

    def cut(self):
        self.max_steps = STEPS if self.max_steps < 0 else min(self.max_steps, STEPS)
        self.use_cpu, self.report_to, self.disable_tqdm, self.save_strategy = True, "none", True, "no"
        complete(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", cut)
    monkeypatch.setattr("sys.argv", ["script.py"])
    AcceleratorState._reset_state()
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
    gc.collect()


@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.stem)
def test_the_python_blocks_of_a_page_run(page, short):
    names = {**namespace(), **{name: make() for name, make in ALSO.get(page.stem, {}).items()}}
    for block in blocks(page, "python"):
        source = fill(block.text)
        save_standins(source)
        prepare_block(names, source)
        for statement in ast.parse("\n" * (block.line - 1) + source, str(page)).body:
            prepare(names, ast.unparse(statement))
            exec(compile(ast.Module([statement], []), str(page), "exec"), names)


def make_conversations():
    from datasets import Dataset

    return Dataset.from_list([{"text": "Good morning. How are you?"}] * 8)


def sft_trainer():
    from trl import SFTTrainer

    return SFTTrainer


def make_sparse_checkpoints() -> list[str]:
    paths = ["sparse-one", "sparse-two"]
    for seed, path in enumerate(paths):
        sparsify(make_model(seed), density=0.2).save_pretrained(path)
    return paths


# What single pages take for granted besides.
ALSO = {
    "training": {
        "SFTTrainer": sft_trainer,
        "MyAdagrad": lambda: type("MyAdagrad", (torch.optim.Optimizer,), {}),
        "MyAveragingSGD": lambda: type("MyAveragingSGD", (torch.optim.Optimizer,), {}),
    },
    "distillation": {"SFTTrainer": sft_trainer},
    "integrations": {"accelerator": lambda: Accelerator(cpu=True)},
    "trl_peft": {"conversations": make_conversations},
    "averages": {
        "paths": make_sparse_checkpoints,
        "first": lambda: sparsify(make_model(0), density=0.2),
        "second": lambda: sparsify(make_model(1), density=0.2),
        "batches": lambda: [{key: value[None] for key, value in row.items()} for row in make_dataset(4)],
    },
}


def test_quick_start_shows_the_example():
    first = blocks(DOCS / "quick_start.md", "python")[0]
    assert first.text == (ROOT / "examples" / "pretrain.py").read_text(encoding="utf-8")

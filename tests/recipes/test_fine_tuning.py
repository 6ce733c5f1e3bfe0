"""Fine-tuning by the recipe: what is refused before data is read, what is measured and when, and that it resumes."""

import json
import random
from pathlib import Path

import fine_tuning
import numpy as np
import pytest
import run_clm
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from arguments import FineTuningArguments
from fine_tuning import (
    Stages,
    calibration_arguments,
    load_dense,
    settle_fine_tuning,
    teacher_arguments,
    tokens_per_second,
)
from results import format_table
from run_clm import main
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments
from windows import EvaluationWindows

from hf_topkast import (
    TopKastConfig,
    TopKastDistillationConfig,
    TopKastDistillationTrainer,
    densify,
    sparsify,
)


RECIPES = Path(fine_tuning.__file__).parent
WINDOW = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small text, a model that has learnt it in a short dense training, and a configuration that fine-tunes it."""
    folder = tmp_path_factory.mktemp("tune")
    choose = random.Random(0).choice
    lines = [" ".join(choose(["sparse", "dense", "layer", "weight"]) for _ in range(6)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "dataset": "text",
        "data_file": str(folder / "text.txt"),
        "cache_dir": str(folder / "cache"),
        "window": WINDOW,
        "max_eval_bytes": 203,
        "save_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "sample_tokens": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    first = {"model_type": "llama", "config_overrides": sizes, "sparse": False, "max_steps": 150}
    first |= {"learning_rate": 1e-2, "save_strategy": "no", "output_dir": str(folder / "dense")}
    (folder / "first.yaml").write_text(json.dumps(settings | first))
    main([str(folder / "first.yaml")])
    then = {"model_name_or_path": str(folder / "dense"), "max_steps": 8, "learning_rate": 1e-3}
    then |= {"density": 0.3, "backward_density": 0.5, "refresh_every": 3, "penalty": 0.0}
    (folder / "config.yaml").write_text(json.dumps(settings | then))
    return folder


def run(folder, name, *command_line):
    return main([str(folder / "config.yaml"), "--output_dir", str(folder / name), *command_line])


CALIBRATED = ("--calibration_windows", "6")
KINDS = {
    "calibrated": CALIBRATED,
    "corrected": (*CALIBRATED, "--correct", "true"),
    "distilled": (*CALIBRATED, "--teacher", "self", "--hidden_weight", "2", "--temperature", "2"),
    "scheduled": (*CALIBRATED, "--initial_density", "1.0"),
    "dense": ("--sparse", "false"),
}


@pytest.fixture(scope="module")
def runs(folder):
    """The results of a run of each kind, made when it is asked for."""
    made = {}

    def get(kind):
        made[kind] = made.get(kind) or run(folder, f"run-{kind}", *KINDS[kind])
        return made[kind]

    return get


def valid_of(folder, model):
    """Bits per byte of the valid split, window by window."""
    text = (folder / "text.txt").read_bytes()
    start = text.rfind(b"\n", 0, len(text) * 90 // 100) + 1
    nats = 0.0
    model.eval()
    for window in EvaluationWindows(np.frombuffer(text[start : start + 203], np.uint8), WINDOW, ord("\n"), "valid"):
        with torch.no_grad():
            loss = model(**{name: tensor[None] for name, tensor in window.items()}).loss
        nats += loss.item() * int((window["labels"] != -100).sum())
    return nats / 203 / np.log(2)


def weights_in(output_dir):
    """All that stands in the weight files of a directory, θ outside A and the sets included."""
    files = {path.name: load_file(path) for path in output_dir.glob("*.safetensors")}
    return {(name, key): tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def spread_windows(folder, count):
    """The windows that calibrate, by hand."""
    text = (folder / "text.txt").read_bytes()
    train = np.frombuffer(b"\n" + text[: text.rfind(b"\n", 0, len(text) * 90 // 100) + 1], np.uint8).astype(np.int64)
    number = (len(train) - 1) // (WINDOW - 1)
    places = [index * number // count * (WINDOW - 1) for index in range(count)]
    return [torch.from_numpy(train[place : place + WINDOW])[None] for place in places]


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_those_of_the_same_model_made_by_hand(runs, folder, kind):
    results = runs(kind)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert results["valid_bits_per_byte_before"] == pytest.approx(valid_of(folder, model), rel=1e-4)
    assert results["state_bytes_before"] == results["dense_state_bytes"]
    if kind == "dense":
        assert not any(key.endswith("_at_cut") for key in results)
    else:
        settings = {"density": 0.3, "backward_density": 0.5, "initial_density": 1.0 if kind == "scheduled" else None}
        sparsify(model, **settings, calibration=spread_windows(folder, 6), correct=kind == "corrected")
        assert results["valid_bits_per_byte_at_cut"] == pytest.approx(valid_of(folder, model), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(folder / f"run-{kind}")
    assert results["valid_bits_per_byte"] == pytest.approx(valid_of(folder, saved), rel=1e-4)
    assert results["generate_tokens_per_second_before"] > 0 < results["generate_tokens_per_second"]
    files = [path for path in (folder / f"run-{kind}").iterdir() if path.suffix == ".safetensors"]
    assert results["weight_file_bytes"] == sum(len(path.read_bytes()) for path in files)
    assert json.loads((folder / f"run-{kind}" / "results.json").read_text()) == results


def test_a_cut_costs_less_where_weights_are_corrected_and_nothing_on_a_schedule(runs):
    before, cut = (runs("calibrated")[f"valid_bits_per_byte_{stage}"] for stage in ("before", "at_cut"))
    assert before < runs("corrected")["valid_bits_per_byte_at_cut"] < cut
    assert runs("calibrated")["valid_bits_per_byte"] < cut
    scheduled = runs("scheduled")
    assert scheduled["valid_bits_per_byte_at_cut"] == pytest.approx(before, rel=1e-6), "nothing is cut yet"
    assert scheduled["state_bytes"] < scheduled["state_bytes_at_cut"] > scheduled["state_bytes_before"]
    assert scheduled["peak_state_bytes"] == scheduled["state_bytes_at_cut"]


def test_calibration_sets_the_score_of_the_saved_model(runs, folder):
    runs("calibrated")
    config = AutoModelForCausalLM.from_pretrained(folder / "run-calibrated").topkast.config
    assert (config.score, config.compare) == ("activation", "row")


@pytest.mark.parametrize("kind", KINDS)
def test_resume_ends_where_an_unbroken_run_does(runs, folder, kind, monkeypatch):
    whole = runs(kind)
    output_dir = folder / f"run-{kind}"
    weights = weights_in(output_dir)
    (output_dir / "checkpoint-8").rename(output_dir / "aside")
    seen = {}
    monkeypatch.setattr(run_clm, "evaluate", lambda *arguments: pytest.fail("measured again"))
    monkeypatch.setattr(run_clm, "sparsify", lambda model, *a, **k: seen.update(k) or sparsify(model, *a, **k))
    resumed = run(folder, f"run-{kind}", *KINDS[kind], "--resume")
    again = weights_in(output_dir)
    assert again.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
    assert not seen.get("correct")
    measured_anew = {"train_seconds", "command", "generate_tokens_per_second"}
    assert {key for key, value in resumed.items() if whole[key] != value} <= measured_anew
    assert resumed["generate_tokens_per_second_before"] == whole["generate_tokens_per_second_before"]


def test_a_teacher_is_the_dense_model_in_bfloat16(runs, folder, monkeypatch):
    trainers = []
    monkeypatch.setattr(
        run_clm,
        "TopKastDistillationTrainer",
        lambda **arguments: trainers.append(TopKastDistillationTrainer(**arguments)) or trainers[-1],
    )
    run(folder, "run-taught", *KINDS["distilled"], "--max_steps", "1")
    (trainer,) = trainers
    assert trainer.distillation == TopKastDistillationConfig(hidden_weight=2.0, temperature=2.0)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(trainer.teacher.parameters(), dense.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(trainer.teacher.buffers(), dense.buffers(), strict=True))
    runs("distilled")
    history = json.loads((folder / "run-distilled" / "trainer_state.json").read_text())["log_history"]
    assert any("distill/hidden" in entry for entry in history)


DENSITIES = {
    "dense": 1,
    "pruned": 0.4,
    "smollm2_density_50": 0.5,
    "smollm2_density_50_distilled": 0.5,
    "smollm2_density_20": 0.2,
}
OF_A_TOY = (
    *("dataset", "data_file", "cache_dir", "window", "max_eval_bytes", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "sample_tokens", "use_cpu", "disable_tqdm", "max_steps", "save_steps"),
)


@pytest.mark.parametrize(("name", "density"), DENSITIES.items())
def test_every_recipe_trains(folder, tmp_path, name, density):
    """With its own settings, bfloat16 included, but on a toy."""
    settings = yaml.safe_load((RECIPES / "finetune" / f"{name}.yaml").read_text())
    toy = json.loads((folder / "config.yaml").read_text())
    del settings["tokenizer"]
    settings |= {key: toy[key] for key in OF_A_TOY} | {"warmup_steps": 0, "eval_strategy": "no"}
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    if name == "pruned":
        prune(model, density)
    if "teacher" in settings:
        baseline = yaml.safe_load((RECIPES / "finetune" / "dense.yaml").read_text())
        assert settings["teacher"] == f"./{baseline['output_dir']}"
        settings["teacher"] = str(folder / "dense")
    model.save_pretrained(tmp_path / "model")
    settings |= {"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    results = main([str(tmp_path / "config.yaml")])
    assert results["density"] == pytest.approx(density, abs=2e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.dtype == torch.float32
    if name == "pruned":
        assert results["valid_bits_per_byte_at_cut"] == results["valid_bits_per_byte_before"]
        zeros = [weight == 0 for key, weight in model.state_dict().items() if "_proj" in key]
        trained = [weight == 0 for key, weight in densify(saved).state_dict().items() if "_proj" in key]
        assert all(map(torch.equal, zeros, trained))


def prune(model, density):
    """Makes the smallest weights of each projection zero."""
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            weight[weight.abs() < weight.abs().quantile(1 - density)] = 0


def test_a_model_stored_in_bfloat16_is_trained_in_float32(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder / "dense").bfloat16().save_pretrained(tmp_path / "half")
    assert load_dense(str(tmp_path / "half")).dtype == torch.float32


def test_printed_table_and_card_have_all_stages(folder, capsys):
    results = run(folder, "run-printed", "--max_steps", "1")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for key in ("valid_bits_per_byte", "state_bytes"):
        (row,) = [row for row in rows if row and row[0] == key]
        values = [results[f"{key}{stage}"] for stage in ("_before", "_at_cut", "")]
        assert row[1:] == [f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for value in values]
    assert ["before", "at", "the", "cut", "after"] in rows
    assert "at the cut" in (folder / "run-printed" / "README.md").read_text()


def test_a_table_without_stages_is_a_list():
    assert format_table({"steps": 1000, "loss": 0.5, "none": None, "versions": {}}) == "steps  1,000\nloss   0.5000"


def settle(sparse=True, model="name", config=None, **settings):
    settle_fine_tuning(FineTuningArguments(**settings), config or TopKastConfig(), sparse, model)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"correct": True}, "`correct` is true, but `calibration_windows` is 0"),
        ({"calibration_windows": -1}, "`calibration_windows` is -1"),
        ({"temperature": 2.0}, "`temperature` is 2.0, but there is no `teacher`"),
        ({"task_weight": 0.0}, "`task_weight` is 0.0, but there is no `teacher`"),
        ({"teacher": "self", "logit_weight": -1.0}, "logit_weight=-1.0"),
        ({"teacher": "self", "logit_weight": 0.0, "hidden_weight": 0.0}, "nothing is learnt"),
        ({"teacher": "self", "sparse": False}, "`teacher` is 'self', but `sparse` is false"),
        ({"calibration_windows": 4, "sparse": False}, "`calibration_windows` is 4, but `sparse` is false"),
        ({"teacher": "self", "model": None}, "a new model has nothing to teach"),
        ({"config": TopKastConfig(score="activation")}, "`score: activation`.*`calibration_windows` is 0"),
        ({"calibration_windows": 4, "config": TopKastConfig(method="rigl")}, "`calibration_windows` is 4.*rigl"),
        ({"calibration_windows": 4, "config": TopKastConfig(density="nonzero")}, "`density: nonzero`"),
        (
            {"calibration_windows": 4, "correct": True, "config": TopKastConfig(initial_density=1.0)},
            "`correct`.*`initial_density: 1`",
        ),
    ],
    ids=str,
)
def test_settings_without_effect_are_errors(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        settle(**settings)


def test_they_are_errors_before_data_is_read(folder, monkeypatch):
    monkeypatch.setattr(run_clm, "load_corpus", lambda args: pytest.fail("went on"))
    with pytest.raises(ValueError, match="`sparse` is false"):
        run(folder, "wrong", "--sparse", "false", *CALIBRATED)
    with pytest.raises(ValueError, match="no `teacher`"):
        run(folder, "wrong", "--hidden_weight", "1")


def test_more_windows_than_there_are_is_an_error(folder):
    with pytest.raises(ValueError, match="`calibration_windows` is 100,000, but there are"):
        run(folder, "wrong", "--calibration_windows", "100000")


def test_calibration_windows_are_spread_over_the_training_split():
    tuning = FineTuningArguments(calibration_windows=4, correct=True)
    arguments = calibration_arguments(tuning, range(10), lambda number: torch.tensor([number]), resumed=False)
    assert [batch.tolist() for batch in arguments["calibration"]] == [[[0]], [[2]], [[5]], [[7]]]
    assert arguments["correct"]
    assert calibration_arguments(FineTuningArguments(), range(10), None, resumed=False) == {}


def test_stages_are_measured_anew_unless_a_run_is_resumed(tmp_path):
    first = Stages(tmp_path, resumed=False)
    first.note("before", lambda: {"loss": 1.0})
    first.write()
    for resumed, expected in ((True, 1.0), (False, 2.0)):
        then = Stages(tmp_path, resumed)
        then.note("before", lambda: {"loss": 2.0})
        assert then.values == {"loss_before": expected}
    (tmp_path / "before.json").unlink()
    lost = Stages(tmp_path, resumed=True)
    lost.note("before", lambda: {"loss": 2.0})
    assert lost.values == {"loss_before": 2.0}


def test_generation_is_timed_over_as_many_tokens_as_the_prompt_has(tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, eos_token_id=3, **sizes))
    moments = iter([10.0, 20.0, 30.0, 32.0])
    monkeypatch.setattr(fine_tuning.time, "perf_counter", lambda: next(moments))
    lengths = []
    monkeypatch.setattr(model, "generate", lambda *a, g=model.generate, **k: lengths.append(g(*a, **k).shape[1]))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert tokens_per_second(model, torch.arange(6), args) == 3.0, "6 tokens in the 2 seconds of the second call"
    assert lengths == [12, 12]


def test_a_real_pretrained_model(folder, shared_data):
    """Its tokens are not bytes, so it has all to learn: what is checked is that the way is the same."""
    given = ("--model_name_or_path", str(shared_data / "stories260k"), "--max_steps", "4")
    results = run(folder, "run-stories", *given, *CALIBRATED, "--teacher", "self")
    assert results["valid_bits_per_byte"] < results["valid_bits_per_byte_at_cut"]
    assert results["density"] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_its_configurations(name, kind):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == (kind, 2)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


def test_a_teacher_by_name_is_left_to_the_trainer():
    assert teacher_arguments(FineTuningArguments(), "name") == {}
    taught = teacher_arguments(FineTuningArguments(teacher="other"), "name")
    assert taught == {"teacher": "other", "distillation": TopKastDistillationConfig()}

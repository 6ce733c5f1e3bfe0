from pathlib import Path

import arguments
import pytest
import torch
import yaml
from arguments import DATACLASSES, DataArguments, ModelArguments, parse_arguments
from transformers import TrainingArguments


RECIPES = Path(arguments.__file__).parent
CONFIGS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("accelerate", "paper"))
CONFIGS.remove(RECIPES / "finetune" / "chat.yaml")  # is for run_sft.py: see test_run_sft.py


@pytest.fixture
def parse(tmp_path):
    def parse(text, *command_line):
        path = tmp_path / "config.yaml"
        path.write_text(text + f"\noutput_dir: {tmp_path}\nuse_cpu: true\n")
        return parse_arguments([str(path), *command_line])

    return parse


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_every_recipe_parses_and_says_how_to_launch_it(path, tmp_path, monkeypatch):
    settings = yaml.safe_load(path.read_text())
    if settings.get("teacher", "self") != "self":  # what another recipe writes
        monkeypatch.chdir(tmp_path)
        Path(settings["teacher"]).mkdir(parents=True)
    bf16 = ["--bf16", "false"] if "bf16" in settings else []  # not every machine that runs this test has it
    found = parse_arguments([str(path), *bf16])
    training = found[4]
    for field, value in settings.items():
        holder = next(holder for holder in found if hasattr(holder, field))
        if field not in ("bf16", "report_to"):
            assert getattr(holder, field) == value, field
    comment = path.read_text().split("\n\n")[0]
    assert comment.startswith("# ")
    assert path.relative_to(RECIPES.parent).as_posix() in comment
    assert training.output_dir != TrainingArguments.output_dir


def test_recipes_write_to_folders_of_their_own():
    folders = [yaml.safe_load(path.read_text())["output_dir"] for path in CONFIGS]
    assert len(set(folders)) == len(folders) > 10


def projection_weights(path):
    """Weights of the attention and MLP projections of a GPT-2-style configuration."""
    sizes = yaml.safe_load(path.read_text())["config_overrides"]
    width = sizes["n_embd"]
    assert width % sizes["n_head"] == 0
    return sizes["n_layer"] * (4 * width**2 + 2 * width * sizes["n_inner"])


@pytest.mark.parametrize("folder", ["enwik8", "enwik8/cpu", "wikitext103"])
def test_small_dense_has_as_many_weights_as_the_sparse_model_has_nonzeros(folder):
    sparse = RECIPES / folder / "topkast_80_60.yaml"
    nonzeros = 0.2 * projection_weights(sparse)
    assert yaml.safe_load(sparse.read_text())["density"] == 0.2
    assert nonzeros <= projection_weights(RECIPES / folder / "small_dense.yaml") <= 1.005 * nonzeros
    assert projection_weights(RECIPES / folder / "dense.yaml") == projection_weights(sparse)


def test_command_line_wins_over_file_and_file_over_defaults(parse):
    text = "learning_rate: 1e-3\nwindow: 64\nsparse: false\ndensity: 0.3"
    model, data, run, topkast, training, _ = parse(text, "--window", "32", "--sparse", "true", "--density=0.1")
    assert (training.learning_rate, training.seed) == (1e-3, 42)  # YAML reads 1e-3 as a string
    assert (data.window, model.sparse, run.resume) == (32, True, False)
    assert (topkast.density, topkast.backward_density) == (0.1, 0.2)


def test_nested_values_come_from_file_or_command_line(parse):
    text = "config_overrides: {n_layer: 2}\ntarget_modules: [c_attn, c_fc]"
    model, _, _, topkast, _, _ = parse(text)
    assert model.config_overrides == {"n_layer": 2}
    assert topkast.target_modules == ["c_attn", "c_fc"]
    model, _, _, topkast, _, _ = parse(text, "--config_overrides", '{"n_layer": 3}', "--target_modules", "c_proj")
    assert model.config_overrides == {"n_layer": 3}
    assert topkast.target_modules == ["c_proj"]


def test_a_regex_of_target_modules_stays_one_string(parse):
    _, _, _, topkast, _, _ = parse(r"target_modules: h\.\d+\.mlp\..*")
    assert topkast.target_modules == r"h\.\d+\.mlp\..*"


def test_unknown_key_of_the_file_is_an_error_with_near_matches(parse):
    with pytest.raises(ValueError, match=r"`refresh_evry` \(did you mean refresh_every"):
        parse("refresh_evry: 10")


def test_unknown_option_is_an_error_with_near_matches(parse):
    with pytest.raises(ValueError, match=r"`windwo` \(did you mean window"):
        parse("window: 64", "--windwo", "32")
    with pytest.raises(ValueError, match="`learning`"):  # abbreviations are no options
        parse("window: 64", "--learning=3")


def test_value_out_of_range_is_an_error_that_names_the_field(parse):
    with pytest.raises(ValueError, match=r"density=1\.5"):
        parse("density: 1.5")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"- a\n- b", "is not a list of"),
        (b"1: 2", "is not a list of"),
        ("window: 64".encode("utf-16"), "is not YAML in UTF-8"),
        (None, "no configuration file"),
    ],
)
def test_bad_configuration_file_is_an_error(text, complaint, tmp_path):
    path = tmp_path / "config.yaml"
    if text:
        path.write_bytes(text)
    with pytest.raises(ValueError, match=complaint):
        parse_arguments([str(path)])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("restore_callback_states_from_checkpoint: true", "would put other callbacks .* Leave it out"),
        ("save_strategy: no", r"`save_strategy` is False in `.*yaml`: .*write \"no\"\.$"),
        ("dataset: wikitext", r"`dataset` is 'wikitext' in `.*yaml`: it must be one of \['enwik8', 'wikitext103'"),
        ("window: 16.5", r"`window` is 16\.5 in .* a whole number"),
        ("window: null", "`window` is null in .* leave it out for 256"),
        ("learning_rate:", "`learning_rate` is null in .* give a number"),
        ("max_steps: true", r"`max_steps` is True in .* a whole number"),
        ("config_overrides: [1]", r"`config_overrides` is \[1\]: give a mapping"),
        ("max_train_bytes: -1", "`max_train_bytes` is -1: give a number from 1 on"),
        ("max_eval_bytes: 0", "`max_eval_bytes` is 0: give a number from 1 on"),
        ("sample_tokens: -1", "`sample_tokens` is -1: give a number from 0 on"),
        ("sample_prompt_tokens: 0", "`sample_prompt_tokens` is 0: give a number from 1 on"),
    ],
)
def test_values_that_a_field_cannot_have_are_errors_that_name_it(parse, setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(setting)


def test_null_is_a_value_where_there_is_a_choice(parse):
    assert parse("density_schedule: null\nmax_eval_bytes: null")[3].density_schedule is None


@pytest.mark.parametrize("field", ["tokenizer", "model_name_or_path", "teacher"])
def test_a_directory_that_is_not_there_is_named(parse, field, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}` is `.*missing`, and there is no such directory"):
        parse("", f"--{field}", str(tmp_path / "missing"))
    assert parse("", f"--{field}", str(tmp_path)) and parse("", f"--{field}", "owner/name")


@pytest.mark.parametrize("text", ["{n_layer: 2", "[1]", "2"])
def test_overrides_that_are_no_mapping_are_an_error_that_names_the_field(parse, text):
    with pytest.raises(ValueError, match="`config_overrides` is .*give JSON"):
        parse("", "--config_overrides", text)
    assert parse("config_overrides: {n_layer: 2}", "--config_overrides", "null")[0].config_overrides is None


@pytest.mark.parametrize("there", [True, False])
def test_memory_is_pinned_for_accelerators_only(parse, there, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    assert parse("", "--use_cpu", "false")[4].dataloader_pin_memory == there


def test_the_seed_is_all_that_two_dataclasses_share():
    names = [name for found in DATACLASSES for name in found.__dataclass_fields__ if name != "quant_method"]
    assert {name for name in names if names.count(name) > 1} == {"seed"}


def test_a_field_that_two_dataclasses_share_goes_to_both(parse):
    _, _, _, topkast, training, _ = parse("seed: 7")
    assert (topkast.seed, training.seed) == (7, 7)
    _, _, _, topkast, training, _ = parse("seed: 7", "--seed", "8")
    assert (topkast.seed, training.seed) == (8, 8)


def test_contradicting_arguments_are_errors():
    with pytest.raises(ValueError, match="needs `tokenizer`"):
        DataArguments(dataset="wikitext103")
    with pytest.raises(ValueError, match="leave `tokenizer` out"):
        DataArguments(dataset="enwik8", tokenizer="gpt2")
    with pytest.raises(ValueError, match="`config_overrides` is for new models"):
        ModelArguments(config_overrides={"n_layer": 2}, model_name_or_path="gpt2")

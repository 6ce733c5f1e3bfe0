from pathlib import Path

import arguments
import pytest
import yaml
from arguments import FineTuningArguments
from sweep_costs import estimate_training_flops
from sweep_plan import parse_run, read_sweep
from sweep_plots import group_rows
from sweep_yaml import load_yaml


PAPER = Path(arguments.__file__).parent / "paper"
SWEEPS = sorted(path for path in PAPER.glob("*.yaml") if path.stem not in ("cpu", "smoke"))


@pytest.fixture
def read(tmp_path):
    """Reads a sweep file with this text; there is a base beside it."""
    (tmp_path / "base.yaml").write_text("max_steps: 10\nuse_cpu: true\nseed: 5\nconfig_overrides: {n_layer: 2}\n")

    def read(text, **overrides):
        (tmp_path / "sweep.yaml").write_text(f"output_dir: {tmp_path}/out\nbase: base.yaml\n{text}")
        return read_sweep(tmp_path / "sweep.yaml", overrides)

    return read


def finish(*scores):
    """Results by the runs that have them."""
    return {run.folder: {"valid_bits_per_byte": score} for run, score in scores}


def test_a_row_is_base_then_settings_then_its_own_fields(read):
    (row,) = read(
        "settings: {max_steps: 20, window: 64, config_overrides: {n_embd: 32}}\n"
        "rows: {a: {window: 32, config_overrides: {n_head: 4}, learning_rate: 1e-3}}"
    ).rows
    assert row.name == "a" and row.values == [0.001]
    assert row.settings["max_steps"] == 20 and row.settings["window"] == 32
    assert row.settings["config_overrides"] == {"n_layer": 2, "n_embd": 32, "n_head": 4}
    assert "seed" not in row.settings and "learning_rate" not in row.settings


def test_runs_have_directories_of_their_own_and_all_settings(read, tmp_path):
    sweep = read("rows: {80/60: {learning_rate: [1e-3, 2e-3]}}\nseeds: [3, 4]")
    runs = sweep.first_runs(sweep.rows[0])
    names = ["80-60/learning_rate-0.001/seed-3", "80-60/learning_rate-0.002/seed-3"]
    assert [run.folder for run in runs] == [tmp_path / "out" / name for name in names]
    assert runs[1].settings["learning_rate"] == 0.002 and runs[1].settings["seed"] == 3
    assert runs[1].settings["output_dir"] == str(runs[1].folder)


def test_lists_make_rows_and_the_tuned_list_makes_values(read):
    sweep = read("rows: {a: {density: [0.1, 0.2], penalty: [0.0, 1e-4], learning_rate: [1e-3, 2e-3]}}")
    assert [row.name for row in sweep.rows] == [
        f"a, density {density}, penalty {penalty}" for density in (0.1, 0.2) for penalty in (0.0, 0.0001)
    ]
    assert all(row.values == [0.001, 0.002] for row in sweep.rows)
    assert sweep.rows[2].settings["density"] == 0.2 and sweep.rows[2].settings["penalty"] == 0.0


def test_another_field_can_be_the_tuned_one(read):
    sweep = read("tune: penalty\nrows: {a: {learning_rate: [1e-3, 2e-3], penalty: [0.0, 1e-4]}}")
    assert [row.name for row in sweep.rows] == ["a, learning_rate 0.001", "a, learning_rate 0.002"]
    assert sweep.rows[0].values == [0.0, 0.0001]


def test_a_value_that_is_a_list_is_a_list_in_a_list(read):
    sweep = read("rows: {a: {block_size: [[4, 4]]}, b: {block_size: [[4, 4], [8, 4]]}}")
    assert [row.settings["block_size"] for row in sweep.rows] == [[4, 4], [4, 4], [8, 4]]
    assert [row.name for row in sweep.rows] == ["a", "b, block_size [4, 4]", "b, block_size [8, 4]"]


def test_grid_multiplies_rows_but_not_dense_ones_nor_those_that_have_the_field(read):
    sweep = read(
        "grid: {density: [0.1, 0.2], window: [32, 64]}\n"
        "rows: {dense: {sparse: false}, a: {}, b: {density: 0.5, window: 16}}"
    )
    assert [row.name for row in sweep.rows] == [
        *["dense, window 32", "dense, window 64"],
        *[f"a, density {density}, window {window}" for density in (0.1, 0.2) for window in (32, 64)],
        "b",
    ]
    assert "density" not in sweep.rows[0].settings


def test_rows_may_be_fine_tunings(read):
    sweep = read(
        "settings: {model_name_or_path: name, config_overrides: }\n"
        "grid: {calibration_windows: [4, 8]}\n"
        "rows: {dense: {sparse: false}, a: {correct: true}, b: {calibration_windows: 2, teacher: self}}"
    )
    rows = {row.name: row for row in sweep.rows}
    assert [*rows] == ["dense", "a, calibration_windows 4", "a, calibration_windows 8", "b"]
    _, _, _, topkast, _, tuning = parse_run(sweep.first_runs(rows["a, calibration_windows 8"])[0])
    assert tuning == FineTuningArguments(calibration_windows=8, correct=True) and topkast.score == "activation"
    assert "calibration_windows" not in rows["dense"].settings and rows["b"].settings["teacher"] == "self"


def test_overrides_win_over_rows(read):
    sweep = read("rows: {a: {max_steps: 20, learning_rate: [1e-3, 2e-3]}}", max_steps=30, learning_rate=0.5, seeds=[7])
    assert sweep.rows[0].settings["max_steps"] == 30 and sweep.rows[0].values == [0.5] and sweep.seeds == [7]


def test_a_file_like_another(read, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.yaml").write_text("window: 8\nuse_cpu: true\n")
    (tmp_path / "deep" / "like.yaml").write_text(
        "rows: {a: {window: 64, base: other.yaml}, b: {}}\nseeds: [1, 2]\nbase: nothing.yaml"
    )
    sweep = read("like: deep/like.yaml\nseeds: [9]\noverrides: {density: 0.3}")
    assert sweep.seeds == [9] and [row.settings["density"] for row in sweep.rows] == [0.3, 0.3]
    assert sweep.rows[0].settings["window"] == 64 and "max_steps" not in sweep.rows[0].settings
    assert sweep.rows[1].settings["max_steps"] == 10


def test_other_seeds_wait_for_the_best_value(read):
    sweep = read("rows: {a: {learning_rate: [1e-3, 2e-3, 4e-3]}}\nseeds: [0, 1, 2]")
    (row,) = sweep.rows
    first = sweep.first_runs(row)
    assert [run.seed for run in first] == [0, 0, 0] and sweep.total_runs(row, {}) == 5
    assert sweep.wanted_runs(row, finish((first[0], 2.0), (first[1], 1.0))) == first
    wanted = sweep.wanted_runs(row, finish((first[0], 2.0), (first[1], 1.0), (first[2], float("nan"))))
    assert wanted[:3] == first and [(run.value, run.seed) for run in wanted[3:]] == [(0.002, 1), (0.002, 2)]


def test_seeds_everywhere_choose_by_the_mean(read):
    sweep = read("rows: {a: {learning_rate: [1e-3, 2e-3]}}\nseeds: [0, 1]\nseeds_everywhere: true")
    (row,) = sweep.rows
    runs = sweep.first_runs(row)
    assert len(runs) == sweep.total_runs(row, {}) == 4
    scores = {(0.001, 0): 1.0, (0.001, 1): 4.0, (0.002, 0): 2.0, (0.002, 1): 2.0}
    finished = finish(*((run, scores[run.value, run.seed]) for run in runs))
    assert sweep.best_value(row, finished) == (0.002,)
    finished.pop(runs[3].folder)
    assert sweep.best_value(row, finished) is None


def test_costs_of_experts_are_those_of_the_experts_of_a_token(read):
    sizes = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
    sizes += ", num_key_value_heads: 2, num_experts_per_tok: 2"
    settings = f"settings: {{model_type: mixtral, window: 8, config_overrides: {{{sizes}}}}}"
    sweep = read(f"{settings}\nrows: {{a: {{sparse: false}}, b: {{backward_density: 0.3}}}}".replace("{{", "{"))
    dense, sparse = (estimate_training_flops(sweep.first_runs(row)[0]) for row in sweep.rows)
    block, head, tokens = 4 * 16**2 + 2 * 3 * 16 * 32, 256 * 16, 10 * 8 * 8
    assert dense == 6 * tokens * (2 * block + head)
    assert sparse == pytest.approx(tokens * ((4 * 0.2 + 2 * 0.3) * 2 * block + 6 * head))


def test_close_values_run_with_all_seeds_and_the_best_mean_is_chosen(read):
    sweep = read("rows: {a: {learning_rate: [1e-3, 2e-3, 4e-3, 8e-3]}}\nseeds: [0, 1]\nseeds_within: 0.03")
    (row,) = sweep.rows
    first = sweep.first_runs(row)
    scores = list(zip(first, (2.04, 2.03, 2.0, float("nan"))))
    assert sweep.wanted_runs(row, finish(*scores[:3])) == first
    more = [sweep.run(row, value, 1) for value in (0.002, 0.004)]
    assert sweep.wanted_runs(row, finish(*scores)) == [*first, *more]
    assert sweep.total_runs(row, finish(*scores)) == 6
    assert sweep.best_value(row, finish(*scores, (more[0], 2.0))) is None
    assert sweep.best_value(row, finish(*scores, (more[0], 2.0), (more[1], 2.02))) == (0.004,)
    assert sweep.best_value(row, finish(*scores, (more[0], 2.0), (more[1], 2.04))) == (0.002,)


def test_where_all_diverge_one_value_runs_with_the_other_seeds(read):
    sweep = read("rows: {a: {learning_rate: [1e-3, 2e-3]}}\nseeds: [0, 1]\nseeds_within: 0.03")
    (row,) = sweep.rows
    finished = finish(*((run, float("nan")) for run in sweep.first_runs(row)))
    assert sweep.contenders(row, finished) == [0.001]


def test_edges_are_those_of_numbers_of_which_there_are_several(read):
    sweep = read("rows: {a: {learning_rate: [2e-3, 1e-3, 4e-3]}, b: {learning_rate: 1e-3}}")
    several, one = sweep.rows
    assert [sweep.is_at_edge(several, value) for value in several.values] == [False, True, True]
    assert not sweep.is_at_edge(one, 0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row: {a: {}}", r"`row` \(did you mean rows"),
        ("rows: {a: {denisty: 0.1}}", r"row `a` .*`denisty` \(did you mean density"),
        ("rows: {a: {}}\nsettings: {max_step: 1}", r"`settings` .*`max_step` \(did you mean max_steps"),
        ("rows: {a: {}}\ngrid: {methods: [set]}", r"`grid` .*`methods` \(did you mean method"),
        ("rows: {a: {}}\ntune: learningrate", r"`tune` .*`learningrate` \(did you mean learning_rate"),
        ("rows: {a: {learning_rate: []}}", r"Row `a` .*`learning_rate` has an empty list"),
        ("rows: {a: {}}\ngrid: {density: []}", r"Row `a` .*`density` has an empty list"),
        ("rows: {a: {seed: 1}}", r"row `a` .*`seed` .*give `seeds`"),
        ("rows: {a: {output_dir: x}}", r"row `a` .*`output_dir`"),
        ("rows: {80/60: {}, 80-60: {}}", r"`80/60, .*` and `80-60, .*` have the same directory"),
        ("rows: {a: {learning_rate: [1e-3, 0.001]}}", "have the same directory"),
        ("rows: {a: {density: 2.0}}", r"a, as given, seed 0: density=2.0"),
        (
            "rows: {a: {calibration_windows: 4, sparse: false}}",
            r"a, as given, seed 0: `calibration_windows` is 4.*dense",
        ),
        ("rows: {a: {correct: true}}", r"a, as given, seed 0: `correct` is true"),
        ("rows: {a: {base: nothing.yaml}}", r"no file .*nothing.yaml"),
        ("rows: {a: {}, a: {}}", "`a` stands twice"),
        ("rows: {a: {}}\nseeds: [1, 1]", r"seeds: \[1, 1\]"),
        ("rows: {a: {}}\nseeds: 3", "seeds: 3"),
        ("rows: {a: {}}\nseeds: [[0]]", r"seeds: \[\[0\]\]"),
        ("rows: {a: {}}\nseeds_within: -1", "seeds_within: -1"),
        ("rows: {a: {}}\nseeds_within: near", "seeds_within: near"),
        ("rows: {a: {}}\nseeds_within: .nan", "seeds_within: nan"),
        ("rows: [a, b]", r"In `rows` of .*: `\['a', 'b'\]` is not a list of `name: value` lines"),
        ("rows: {a: 80/60}", "In row `a` of .*: `80/60` is not a list"),
        ("rows: {a: {}}\ngrid: [density]", "In `grid` of .* is not a list"),
        ("rows: {a: {}}\noverrides: [window]", "In `overrides` of .* is not a list"),
        ("rows: {a: {}}\ntune: [learning_rate]", "`tune` .*did you mean learning_rate"),
        ("rows: {a: {}}\nlike: sweep.yaml", "sweep.yaml` is `like` itself"),
        ("rows: {a: {}}\nkeep_models: 'false'", "keep_models: 'false'` in .* is neither true nor false"),
        ("rows: {a: {learning_rate: [fast, 1e-3]}}", "a, learning_rate fast, seed 0: a value cannot be read"),
        ("rows:", "has no `rows`"),
        ("rows: {a: [}", "cannot be read"),
    ],
)
def test_what_cannot_be_run_is_an_error_that_says_where(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_overrides_are_checked_too(read):
    with pytest.raises(ValueError, match=r"--set.*`denisty` \(did you mean density"):
        read("rows: {a: {}}", denisty=0.1)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_file_of_the_paper_reads(path):
    comment = path.read_text().split("\n\n")[0]
    assert f"python recipes/sweep.py recipes/paper/{path.name}" in comment
    sweep = read_sweep(path, {"bf16": False})
    assert len(sweep.rows) > 1 and sweep.output_dir.parts[0] == "runs"
    dense = [row.settings for row in sweep.rows if row.name == "dense"]
    assert any(settings.get("sparse") is False or settings["density"] == 1.0 for settings in dense)


def test_files_of_the_paper_write_to_folders_of_their_own():
    assert len(SWEEPS) > 15
    assert len({load_yaml(path)["output_dir"] for path in SWEEPS}) == len(SWEEPS)


@pytest.mark.parametrize("name", ["table5_cpu", "table5", "table3", "table3_cpu", "rivals", "rivals_cpu"])
def test_small_dense_has_as_many_weights_as_a_has_at_80_percent(name):
    rows = {row.name: row.settings for row in read_sweep(PAPER / f"{name}.yaml", {"bf16": False}).rows}

    def weights(settings):
        sizes = settings["config_overrides"]
        assert sizes["n_embd"] % sizes["n_head"] == 0
        return sizes["n_layer"] * (4 * sizes["n_embd"] ** 2 + 2 * sizes["n_embd"] * sizes["n_inner"])

    nonzeros = 0.2 * weights(rows["dense"])
    assert 0.999 * nonzeros <= weights(rows["small dense"]) <= 1.005 * nonzeros


def test_bases_are_files_for_a_single_run():
    for name in ("cpu", "smoke"):
        assert isinstance(yaml.safe_load((PAPER / f"{name}.yaml").read_text())["max_steps"], int)


def test_lines_of_plots_are_methods_and_what_else_differs(read):
    sweep = read(
        "rows:\n"
        "  dense: {sparse: false}\n"
        "  small: {sparse: false, window: 32}\n"
        "  all of A: {density: 1.0, method: static}\n"
        "  80/60: {density: 0.2, backward_density: 0.4}\n"
        "  90/80: {density: 0.1, backward_density: 0.2, learning_rate: 1e-3}\n"
        "  90/80 often: {density: 0.1, backward_density: 0.2, refresh_every: 5}\n"
        "  90/0: {density: 0.1, backward_density: 1.0}\n"
        "  pruned: {density: nonzero, backward_density: 0.5}\n"
        "  static: {method: static, density: 0.1, refresh_every: 7}\n"
        "  80%, RigL: {method: rigl, density: 0.2}\n"
        "  90%, RigL: {method: rigl, density: 0.1}\n"
        "  80%, both: {method: set, density: 0.2}\n"
        "  90%, both: {method: set, density: 0.1}\n"
        "  80%, both, g: {method: gse, density: 0.2}\n"
        "  two of, both: {method: smet, density: 0.1}\n"
        "  three of, both: {method: smet, density: 0.2}\n"
    )
    assert group_rows(sweep, {row.name: sweep.first_runs(row)[0] for row in sweep.rows}) == {
        "": ["dense", "small", "all of A"],
        "topkast, B = 2 A": ["80/60", "90/80"],
        "topkast, B = 2 A, refresh_every 5": ["90/80 often"],
        "topkast, B = all": ["90/0"],
        "topkast, B = 0.5": ["pruned"],
        "static": ["static"],
        "RigL": ["80%, RigL", "90%, RigL"],
        "set": ["80%, both", "90%, both"],
        "gse": ["80%, both, g"],
        "smet": ["two of, both", "three of, both"],
    }

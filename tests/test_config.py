import copy
import json
import pickle

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from hf_topkast import TopKastConfig


def test_backward_density_defaults_to_twice_density():
    assert TopKastConfig(density=0.2).backward_density == 0.4
    assert TopKastConfig(density=0.7).backward_density == 1.0


def test_settings_for_pretraining():
    config = TopKastConfig.for_pretraining(0.1)
    assert config == TopKastConfig(density=0.1, exploration_lr_scale=0.3, penalty=0.03, penalty_mode="decoupled")
    assert config.backward_density == 0.2
    given = TopKastConfig.for_pretraining(0.1, penalty=0.1, backward_density=0.1)
    assert (given.penalty, given.backward_density, given.exploration_lr_scale) == (0.1, 0.1, 0.3)
    other = TopKastConfig.for_pretraining(0.1, method="rigl")  # which has no exploration set
    assert (other.penalty, other.exploration_lr_scale, other.backward_density) == (0.03, 1.0, 0.1)
    with pytest.raises(ValueError, match="density=2"):
        TopKastConfig.for_pretraining(2)


def test_settings_for_finetuning():
    config = TopKastConfig.for_finetuning(0.5)
    assert config == TopKastConfig(density=0.5, method="static", penalty=0.0)
    assert config.backward_density == 0.5
    exploring = TopKastConfig.for_finetuning(0.5, method="topkast")
    assert (exploring.method, exploring.backward_density, exploring.penalty) == ("topkast", 0.6, 0.0)
    assert TopKastConfig.for_finetuning(0.95, method="topkast").backward_density == 1.0
    assert TopKastConfig.for_finetuning("0.5", method="topkast") == exploring
    given = TopKastConfig.for_finetuning(0.5, method="topkast", penalty=1e-5, backward_density=0.7)
    assert (given.penalty, given.backward_density) == (1e-5, 0.7)
    assert TopKastConfig.for_finetuning("nonzero").backward_density is None
    assert TopKastConfig.for_finetuning(0.3, method="dpf").backward_density == 1.0
    with pytest.raises(ValueError, match="density='half'"):
        TopKastConfig.for_finetuning("half")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("density", 0.0),
        ("density", 1.5),
        ("density", float("nan")),
        ("backward_density", 0.1),
        ("backward_density", 1.01),
        ("refresh_every", 0),
        ("refresh_every", 2.5),
        ("density", "half"),
        ("density", "1.2"),
        ("density", None),
        ("density", True),
        ("refresh_every", float("inf")),
        ("refresh_every", float("nan")),
        ("explore_until", float("inf")),
        ("explore_until", True),
        ("explore_until", "0.5"),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("explore_until", -1),
        ("explore_until", 10.5),
        ("penalty", -1e-4),
        ("penalty", float("inf")),
        ("penalty_mode", "l1"),
        ("new_state", "copy"),
        ("exploration_lr_scale", -0.1),
        ("reservoir_device", "tape"),
        ("block_size", 0),
        ("block_size", [4, 1, 1]),
        ("block_size", "2:4"),
        ("block_size", [2.5, 1]),
        ("scatter_blocks", 1),
        ("scatter_blocks", True),  # without blocks
        ("initial_density", 0.0),
        ("initial_density", 1.1),
        ("initial_density", "nonzero"),
        ("distribution", "ERK"),
        ("distribution", None),
        ("density_overrides", "{"),
        ("density_overrides", ["c_fc"]),
        ("density_overrides", {"c_fc": 0}),
        ("density_overrides", {"c_fc": 1.5}),
        ("density_overrides", {3: 0.5}),
        ("density_overrides", {"(c_fc": 0.5}),
        ("density_schedule", "cubic"),  # without initial_density
        ("schedule_begin", 0.1),
        ("schedule_end", 100),
        ("target_modules", "(unclosed"),
        ("exclude_modules", "*"),
    ],
)
def test_bad_value_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*"):
        TopKastConfig(**{"density": 0.2, field: value})


@pytest.mark.parametrize(("given", "kept"), [(None, [1, 1]), (16, [16, 16]), ((4, 1), [4, 1]), ([32], [32, 32])])
def test_block_size(given, kept):
    assert TopKastConfig(block_size=given).block_size == kept


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"density_schedule": "exponential"}, "density_schedule='exponential'.*cubic"),
        ({"schedule_begin": -1}, "schedule_begin=-1"),
        ({"schedule_end": 10.5}, r"schedule_end=10\.5"),
        ({"schedule_begin": 0.5}, r"schedule_begin=0\.5.*below schedule_end=0\.5"),
        ({"schedule_begin": 50, "schedule_end": 20}, "schedule_begin=50.*below schedule_end=20"),
        ({"schedule_end": 0}, "schedule_begin=0.*below schedule_end=0"),
        ({"density": "nonzero"}, "initial_density=1.0.*left out with density='nonzero'"),
        ({"method": "static"}, "initial_density=1.0.*method='static'"),
    ],
)
def test_bad_schedules(settings, match):
    with pytest.raises(ValueError, match=match):
        TopKastConfig(initial_density=1.0, **settings)


def test_schedule_defaults_come_with_the_initial_density():
    config = TopKastConfig()
    assert (config.density_schedule, config.schedule_begin, config.schedule_end) == (None, None, None)
    config = TopKastConfig(initial_density=1.0)
    assert (config.density_schedule, config.schedule_begin, config.schedule_end) == ("cubic", 0.0, 0.5)


@pytest.mark.parametrize("settings", [{"distribution": "global"}, {"density_overrides": {"c_fc": 0.5}}])
def test_nonzero_leaves_no_choice_of_sizes(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*density='nonzero'"):
        TopKastConfig(density="nonzero", **settings)


def test_backward_density_of_static_and_nonzero():
    assert TopKastConfig(density=0.3, method="static").backward_density == 0.3
    assert TopKastConfig(density=0.3, backward_density=0.4, method="static").backward_density == 0.4
    assert TopKastConfig(density="nonzero").backward_density is None
    assert TopKastConfig(density="nonzero", backward_density=0.1).backward_density == 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"density": "nonzero", "method": "static"},
        {"initial_density": 1.0, "density_schedule": "linear", "schedule_begin": 10, "schedule_end": 0.9},
        {"density_overrides": {r".*c_fc": 0.5, "z": 1.0}, "distribution": "erdos_renyi", "split_fused": True},
    ],
)
def test_json_round_trip_of_sizes_and_schedules(settings):
    config = TopKastConfig(**settings)
    assert TopKastConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_round_trip():
    config = TopKastConfig(
        density=0.1,
        explore_until=0.5,
        block_size=(4, 1),
        target_modules=["c_fc"],
        exclude_modules=r".*h\.0\..*",
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["quant_method"] == "topkast"
    assert TopKastConfig.from_dict(stored) == config


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="no field 'sharpness'"):
        TopKastConfig.from_dict({"density": 0.2, "sharpness": 3})


def test_command_line():
    (config,) = HfArgumentParser(TopKastConfig).parse_args_into_dataclasses(
        ["--density", "0.1", "--explore_until", "500", "--block_size", "4", "1", "--target_modules", "c_fc", "c_proj"]
    )
    assert config == TopKastConfig(
        density=0.1, explore_until=500, block_size=(4, 1), target_modules=["c_fc", "c_proj"]
    )
    (config,) = HfArgumentParser(TopKastConfig).parse_args_into_dataclasses(["--target_modules", "all-linear"])
    assert config.target_modules == "all-linear"


def test_command_line_of_sizes_and_schedules():
    (config,) = HfArgumentParser(TopKastConfig).parse_args_into_dataclasses(
        ["--density", "nonzero", "--method", "static", "--split_fused"]
    )
    assert config == TopKastConfig(density="nonzero", method="static", split_fused=True)
    words = "--initial_density 1 --density_schedule cosine --schedule_end 300 --distribution global --density 0.1"
    (config,) = HfArgumentParser(TopKastConfig).parse_args_into_dataclasses(
        [*words.split(), "--density_overrides", '{".*c_fc": 0.5}']
    )
    assert config == TopKastConfig(
        density=0.1,
        initial_density=1,
        density_schedule="cosine",
        schedule_end=300,
        distribution="global",
        density_overrides={".*c_fc": 0.5},
    )


def test_every_field_has_help():
    fields = TopKastConfig.__dataclass_fields__.values()
    assert all(field.metadata.get("help") for field in fields if field.init)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("refresh_every", np.int64(50), 50),
        ("density", np.float32(0.25), 0.25),
        ("density", torch.tensor(0.25), 0.25),
        ("block_size", np.int64(4), [4, 4]),
        ("block_size", (np.int64(4), np.int64(1)), [4, 1]),
        ("block_size", np.array([4, 1]), [4, 1]),
        ("split_fused", np.bool_(True), True),
        ("explore_until", np.float64(0.5), 0.5),
        ("density_overrides", {"a": np.float64(0.5)}, {"a": 0.5}),
    ],
)
def test_numbers_of_numpy_and_torch(field, value, plain):
    config = TopKastConfig(**{field: value})
    assert getattr(config, field) == plain and type(getattr(config, field)) is type(plain)
    assert TopKastConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_are_checked_when_they_are_set_and_nothing_changes_on_an_error():
    config = TopKastConfig(density=0.2, backward_density=0.45)
    config.density = np.float64(0.3)
    assert config == TopKastConfig(density=0.3, backward_density=0.45)
    for name, value, error, match in (
        ("density", 0.5, ValueError, r"backward_density=0.45 .*\[0.5, 1\]"),
        ("penalty", -1, ValueError, "penalty=-1"),
        ("schedule_end", 5, ValueError, "schedule_end=5"),
        ("densty", 0.5, AttributeError, "no field 'densty'; the fields are"),
    ):
        with pytest.raises(error, match=match):
            setattr(config, name, value)
    assert config == TopKastConfig(density=0.3, backward_density=0.45)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_fixed_fields_are_refused_in_copies_too():
    config = TopKastConfig(density=0.2)
    config.fix(["block_size"], "what the layers were made with; make them anew")
    for held in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(
            ValueError, match=r"block_size=4 is not allowed now: it is \[1, 1\] and what the layers were"
        ):
            held.block_size = 4
        held.density = 0.1


def test_a_backward_density_that_was_not_given_follows_the_density():
    config = TopKastConfig(density=0.2)
    for density in (0.1, 0.6, 0.3):
        config.density = density
        assert config == TopKastConfig(density=density)
    config.method = "static"
    assert config.backward_density == 0.3
    config.backward_density = 0.5
    config.density = 0.4
    assert config.backward_density == 0.5

import json

import pytest
from transformers import HfArgumentParser

from hf_topkast import TopKastConfig


def test_backward_density_defaults_to_twice_density():
    assert TopKastConfig(density=0.2).backward_density == 0.4
    assert TopKastConfig(density=0.7).backward_density == 1.0


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
        ("density", "0.2"),
        ("density", None),
        ("density", True),
        ("refresh_every", float("inf")),
        ("refresh_every", float("nan")),
        ("explore_until", float("inf")),
        ("explore_until", True),
        ("explore_until", "0.5"),
        ("penalty", None),
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


def test_every_field_has_help():
    fields = TopKastConfig.__dataclass_fields__.values()
    assert all(field.metadata.get("help") for field in fields if field.init)

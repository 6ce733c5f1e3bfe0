"""State files that were damaged, cut or made up: each loads exactly what it says or raises `CheckpointError`."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from hf_topkast import CheckpointError, sparsify
from hf_topkast.checkpoints.checkpoint import restore_layer, restore_theta, split_state_dict
from hf_topkast.checkpoints.compact import compact_state
from hf_topkast.checkpoints.state_file import STATE_NAME, digest, read_state, write_state
from hf_topkast.surgery import sparse_layers


SIZES = ((7, 5), (6, 9))


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in SIZES))
    return sparsify(model, density=0.3, target_modules=["0", "1"])


@pytest.fixture(scope="module", params=["training", "compact"])
def written(request, tmp_path_factory):
    """A state file, and the weights α it belongs to."""
    model, folder = make_model(), tmp_path_factory.mktemp("state")
    stock, state = split_state_dict(model, model.state_dict())
    alphas = {name: stock[f"{name}.weight"] for name in state.shapes}
    write_state(state if request.param == "training" else compact_state(model, stock, state), folder)
    return (folder / STATE_NAME).read_bytes(), alphas


def metadata_of(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size])["__metadata__"]


def flip_bits(content, chance):
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 20))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def flip_in_header(content, chance):
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return flip_bits(content[:size], chance) + content[size:]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def lengthen(content, chance):
    return content + chance.randbytes(chance.choice((1, 8, 100)))


def replace_a_part(content, chance):
    start = chance.randrange(len(content))
    return content[:start] + chance.randbytes(chance.choice((1, 4, 64))) + content[start + chance.choice((0, 4, 64)) :]


def forge(content, chance):
    """Changes tensors or metadata and writes a digest that fits, as no accident could."""
    tensors, metadata = load(content), metadata_of(content)
    for _ in range(chance.choice((1, 1, 2))):
        chance.choice(FORGERIES)(tensors, metadata, chance)
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    metadata["digest"] = digest(tensors, metadata)
    return save(tensors, metadata)


def swap_tensors(tensors, metadata, chance):
    one, two = chance.choice(sorted(tensors)), chance.choice(sorted(tensors))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def drop_tensor(tensors, metadata, chance):
    tensors.pop(chance.choice(sorted(tensors)))


def add_tensor(tensors, metadata, chance):
    tensors[chance.choice(("extra", "0.extra", "2.active", "0"))] = torch.zeros(3)


def change_dtype(tensors, metadata, chance):
    key = chance.choice(sorted(tensors))
    kinds = (torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64)
    tensors[key] = tensors[key].to(chance.choice(kinds))


def change_shape(tensors, metadata, chance):
    key = chance.choice(sorted(tensors))
    tensor = tensors[key]
    tensors[key] = chance.choice((tensor[None], tensor.flatten()[:-1], tensor.new_zeros(0), tensor.new_zeros(())))


def change_numbers(tensors, metadata, chance):
    key = chance.choice(sorted(tensors))
    raw = tensors[key].clone().flatten().view(torch.uint8)
    for _ in range(chance.choice((1, 3))):
        if raw.numel():
            raw[chance.randrange(raw.numel())] ^= 1 << chance.randrange(8)
    tensors[key] = raw.view(tensors[key].dtype).view(tensors[key].shape)


JUNK = ("", "null", "[]", "{}", "-1", "1e9", "0.5", '"a"', "{", '{"0": [7]}', '{"0": null}', '{"0": [-7, -5]}', "π")


def change_metadata(tensors, metadata, chance):
    metadata[chance.choice(sorted(metadata))] = chance.choice(JUNK)


def drop_metadata(tensors, metadata, chance):
    metadata.pop(chance.choice(sorted(metadata)))


def change_setting(tensors, metadata, chance):
    try:
        config = json.loads(metadata["config"])
        config[chance.choice([*sorted(config), "novelty"])] = chance.choice(
            (None, -1, 1, 7, "x", [], {}, [["a"]], True)
        )
        metadata["config"] = json.dumps(config)
    except (KeyError, TypeError, ValueError):  # another forgery was there before
        return


def change_layer(tensors, metadata, chance):
    field = chance.choice(("shapes", "digests"))
    values = ([5, 7], [35], [1, 35], [7, 5, 1], "00", None, [7.0, 5.0], [True, 35])
    try:
        layers = json.loads(metadata[field])
        layers[chance.choice(("0", "1", "2"))] = chance.choice(values)
        metadata[field] = json.dumps(layers)
    except (KeyError, TypeError, ValueError):
        return


FORGERIES = (swap_tensors, drop_tensor, add_tensor, change_dtype, change_shape, change_numbers, change_metadata)
FORGERIES += (drop_metadata, change_setting, change_layer)
ACCIDENTS = (flip_bits, flip_in_header, cut, lengthen, replace_a_part)


def load_into_model(folder, alphas):
    """Reads a state file and loads it, and says whether the model then holds exactly what the file does."""
    state = read_state(folder)
    model = make_model()
    layers = dict(sparse_layers(model))
    if set(state.shapes) != set(layers):
        raise CheckpointError("another model")
    for name, layer in layers.items():
        if state.compact:
            if state.shapes[name] != layer.pattern.shape:
                raise CheckpointError("another model")
            active = state.masks(name)[0]
            assert int(active.sum()) == state.tensors[f"{name}.values"].numel()
        else:
            restore_layer(layer, restore_theta(alphas[name], state, name, exact=True), state, name)
    if not state.compact:
        _, again = split_state_dict(model, model.state_dict())
        assert digest(again.tensors) == digest(state.tensors)
    return state


def count_loaded(written, folder, mutations, cases, seed):
    content, alphas = written
    chance, loaded = random.Random(seed), 0
    for _ in range(cases):
        changed = chance.choice(mutations)(content, chance)
        (folder / STATE_NAME).write_bytes(changed)
        try:
            load_into_model(folder, alphas)
        except CheckpointError:
            continue
        loaded += changed != content
    return loaded


def test_the_file_itself_loads(written, tmp_path):
    content, alphas = written
    (tmp_path / STATE_NAME).write_bytes(content)
    assert load_into_model(tmp_path, alphas).shapes == dict(zip("01", SIZES))


def test_no_accident_loads(written, tmp_path):
    assert count_loaded(written, tmp_path, ACCIDENTS, cases=1250, seed=0) == 0


def test_a_forgery_loads_exactly_or_not_at_all(written, tmp_path):
    loaded = count_loaded(written, tmp_path, [forge], cases=1250, seed=1)
    assert 0 < loaded < 1250 / 2

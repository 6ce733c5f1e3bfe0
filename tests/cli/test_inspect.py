import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from toy_models import make_gpt2, make_llama
from transformers import AutoModelForCausalLM

from hf_topkast import export_sparse, headers, sparsify, sparsity_report
from hf_topkast.cli import checkpoint as checkpoint_module


SAME = ("name", "shape", "experts", "weights", "active", "stored", "density", "backward_density")


def by_report(model):
    rows = sparsity_report(model).to_dict()["rows"]
    return [{**{key: row[key] for key in SAME}, "shape": list(row["shape"])} for row in rows]


@pytest.mark.parametrize("form", ["sparse", "sharded"])
def test_counts_are_those_of_the_model(checkpoints, run_json, form):
    model, folder = checkpoints
    found = run_json("inspect", folder / form)
    assert found["kind"] == "sparse" and found["step"] == 3 and found["settings"]["density"] == 0.2
    assert [{key: layer[key] for key in SAME} for layer in found["layers"]] == by_report(model)
    report = sparsity_report(model)
    totals = found["totals"]
    assert totals["density"] == report.density and totals["backward_density"] == report.backward_density
    assert totals["nonzero_parameters"] == report.nonzero_parameters
    assert totals["parameters"] == report.total_parameters
    assert len(found["files"]) == (2 if form == "sparse" else 1 + len(list((folder / form).glob("model-*"))))


CONFIGS = {
    "plain": {},
    "fresh": {"new_state": "fresh"},
    "blocks": {"block_size": [4, 4]},
    "no_reservoir": {"method": "set"},
    "on_disk": {"reservoir_device": "disk"},
    "explored": {"backward_density": 1.0},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_bytes_in_training_are_those_of_the_report(tmp_path, run_json, make, name):
    model = sparsify(make(), density=0.2, **CONFIGS[name])
    model.save_pretrained(tmp_path)
    found = run_json("inspect", tmp_path)
    expected = {row.name: row.trainable_state_bytes for row in sparsity_report(model).rows}
    assert {layer["name"]: layer["training_bytes"] for layer in found["layers"]} == expected


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_one_matrix_each_on_disk_and_as_a_stack(tmp_path, run, run_json, family):
    model = sparsify(make_family(family), density=0.3)
    model.save_pretrained(tmp_path / "sparse")
    export_sparse(model, tmp_path / "compact")
    found, report = run_json("inspect", tmp_path / "sparse"), sparsity_report(model)
    assert [{key: layer[key] for key in SAME} for layer in found["layers"]] == by_report(model)
    assert [layer["training_bytes"] for layer in found["layers"]] == [row.trainable_state_bytes for row in report.rows]
    experts = next(layer for layer in found["layers"] if layer["name"].endswith("layers.0.mlp.experts.gate_up_proj"))
    assert (experts["experts"], experts["shape"], experts["weights"]) == (4, [96, 32], 4 * 96 * 32)
    state = load_file(tmp_path / "sparse" / headers.STATE_NAME)
    own = sum(tensor.nbytes for key, tensor in state.items() if key.startswith(f"{experts['name']}."))
    assert experts["file_bytes"] == own + 4 * experts["weights"]
    exported = {layer["name"]: layer for layer in run_json("inspect", tmp_path / "compact")["layers"]}
    assert exported[experts["name"]]["file_bytes"] == 4 * experts["active"] + experts["weights"] // 8
    for form in ("sparse", "compact"):
        printed = run("inspect", tmp_path / form).splitlines()
        shown = [line for line in printed if f"{experts['name']} " in line or line.startswith(" all of them")]
        assert len(shown) == 2 and "4 × (96 × 32)" in shown[0]
        assert (" - " in shown[0]) == (form == "compact")  # an export is not for training


def test_files_without_numbers_of_experts_show_one_matrix(tmp_path, run_json):
    model = sparsify(make_family("mixtral"), density=0.3, target_modules=["gate_up_proj"])
    model.save_pretrained(tmp_path)
    path = tmp_path / headers.STATE_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["experts"]
    expected = run_json("inspect", tmp_path)["layers"][0]
    save_file(load_file(path), path, metadata)
    found = run_json("inspect", tmp_path)["layers"][0]
    assert found == {**expected, "experts": None, "shape": [4 * 96, 32]}


def test_compact(checkpoints, run_json):
    model, folder = checkpoints
    found = run_json("inspect", folder / "compact")
    assert found["kind"] == "compact"
    assert [layer["active"] for layer in found["layers"]] == [row.active for row in sparsity_report(model).rows]
    assert all(layer["stored"] == layer["active"] for layer in found["layers"])
    assert found["totals"]["parameters"] == sparsity_report(model).total_parameters
    assert found["totals"]["training_bytes"] is None


def test_files_of_0_1_0_have_no_counts_and_their_bits_are_counted(checkpoints, tmp_path, run_json):
    folder = shutil.copytree(checkpoints[1] / "sparse", tmp_path / "old")
    path = folder / headers.STATE_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata["counts"]
    save_file(tensors, path, metadata)
    assert run_json("inspect", folder)["layers"] == run_json("inspect", checkpoints[1] / "sparse")["layers"]


def test_dense(checkpoints, run_json, run):
    folder = checkpoints[1] / "dense"
    found = run_json("inspect", folder)
    assert found["kind"] == "dense" and found["layers"] == []
    assert found["totals"]["parameters"] == sum(p.numel() for p in make_gpt2().parameters())
    assert "ordinary dense checkpoint" in run("inspect", folder)
    layers = {layer["name"]: layer for layer in run_json("inspect", folder, "--count-zeros")["layers"]}
    changed = layers["transformer.h.0.mlp.c_fc.weight"]
    assert changed["weights"] - changed["active"] == 96 and changed["shape"] == [24, 96]
    assert layers["transformer.h.1.mlp.c_fc.weight"]["density"] == 1


def test_zeros_of_bfloat16_have_two_signs(tmp_path, run_json):
    save_file({"a": torch.tensor([[0.0, -0.0, 1.0, 2.0]], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (layer,) = run_json("inspect", tmp_path, "--count-zeros")["layers"]
    assert (layer["active"], layer["weights"]) == (2, 4)


def test_no_model_is_built_and_no_weight_is_read(checkpoints, run, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("built"))
    monkeypatch.setattr(headers.FileHeader, "numbers", lambda *a: pytest.fail("read"))
    printed = run("inspect", checkpoints[1] / "sparse")
    assert "transformer.h.1.mlp.c_proj" in printed and "method topkast, step 3" in printed and "density=0.2" in printed


def test_cut_lines(checkpoints, run):
    """What is piped into a file is not cut to a terminal's width."""
    lines = run("inspect", checkpoints[1] / "sparse").splitlines()
    assert any("transformer.h.1.mlp.c_proj" in line and "0.2001" in line for line in lines)


def test_bad_input(checkpoints, tmp_path, refused):
    assert "has no model.safetensors" in refused("inspect", tmp_path)
    for name in ("model.fp32.safetensors", "model.fp32-00001-of-00007.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert 'variant "fp32". Load it with from_pretrained(..., variant="fp32")' in refused("inspect", tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-100").mkdir()
    assert "checkpoint-100" in refused("inspect", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    assert "is no safetensors file" in refused("inspect", tmp_path)
    assert "is a file" in refused("inspect", tmp_path / "model.safetensors")
    assert "There is no directory" in refused("inspect", tmp_path / "nowhere")
    folder = shutil.copytree(checkpoints[1] / "sharded", tmp_path / "part")
    next(folder.glob("model-00002*")).unlink()
    assert "lacks model-00002" in refused("inspect", folder)
    folder = shutil.copytree(checkpoints[1] / "sparse", tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])
    assert "truncated: 5 bytes" in refused("inspect", folder)


def test_another_version_of_the_format(checkpoints, tmp_path, refused):
    folder = shutil.copytree(checkpoints[1] / "sparse", tmp_path / "new")
    path = folder / headers.STATE_NAME
    data = path.read_bytes()
    assert data.count(b'"format_version":"2"') == 1
    path.write_bytes(data.replace(b'"format_version":"2"', b'"format_version":"9"'))
    for words in (("inspect", folder), ("compare", folder, folder), ("densify", folder, tmp_path / "out")):
        assert "format version '9'" in refused(*words)
    shutil.copy(folder / "model.safetensors", path)  # another file altogether
    assert "format version None" in refused("compare", folder, folder)


def test_an_index_that_is_damaged_or_of_a_former_save(checkpoints, tmp_path, refused, run_json):
    folder = shutil.copytree(checkpoints[1] / "sharded", tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    for content in (index.read_text()[:100], "{}", "[]"):
        index.write_text(content)
        assert "index.json is damaged" in refused("inspect", folder)
    folder = shutil.copytree(checkpoints[1] / "sparse", tmp_path / "sparse")
    shutil.copy(checkpoints[1] / "sharded" / index.name, folder)
    assert run_json("inspect", folder)["layers"] == run_json("inspect", checkpoints[1] / "sparse")["layers"]


def test_a_hub_name_offline(refused):
    assert "hub cannot be reached" in refused("inspect", "nobody/nothing")


def test_a_name_of_the_hub_takes_headers_only(checkpoints, monkeypatch, run_json, tmp_path):
    """The way is the directory's, with a reader that has no numbers at hand."""
    folder = checkpoints[1] / "sparse"

    def fetch(name):
        return (
            {file.name for file in folder.iterdir()},
            folder,
            lambda file: headers.read_header(folder / file)._replace(data=None),
        )

    from hf_topkast.cli import hub

    monkeypatch.setattr(hub, "fetch_headers", fetch)
    assert run_json("inspect", "user/model")["layers"] == run_json("inspect", folder)["layers"]
    opened = checkpoint_module.open_checkpoint("user/model")
    with pytest.raises(ValueError, match="download it first"):
        opened.state.numbers(next(iter(opened.state.tensors)))


def test_the_settings_are_json(checkpoints):
    header = headers.read_header(checkpoints[1] / "sparse" / headers.STATE_NAME)
    counts = json.loads(header.metadata["counts"])
    assert counts == {row.name: [row.active, row.stored] for row in sparsity_report(checkpoints[0]).rows}

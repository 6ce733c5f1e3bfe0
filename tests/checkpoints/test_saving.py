import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from toy_models import make_gpt2, make_llama
from toy_training import same_weights, trained
from transformers import AutoModelForCausalLM

from hf_topkast import CheckpointError, export_sparse, sparsify
from hf_topkast.checkpoints import load_checkpoint
from hf_topkast.checkpoints.state_file import read_state


SHARDS = "20KB"


@pytest.mark.parametrize("variant", [None, "half"])
@pytest.mark.parametrize("sizes", [("1GB", SHARDS), (SHARDS, "1GB"), (SHARDS, "40KB")], ids=str)
def test_a_save_in_other_pieces_takes_the_place_of_the_former(tmp_path, sizes, variant):
    for seed, size in enumerate(sizes):
        model = trained(make_llama, seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant))
    if variant is None:
        other = sparsify(make_llama(seed=2), density=0.2)
        load_checkpoint(other, tmp_path)
        assert same_weights(model, other)


def test_an_index_without_its_shards_beside_one_file_is_passed_over(tmp_path):
    model = trained(make_llama)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "mod', "{}", "[]", '{"weight_map": 1}'])
def test_a_damaged_index_is_named(tmp_path, content):
    model = trained(make_llama)
    model.save_pretrained(tmp_path, max_shard_size=SHARDS)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
        load_checkpoint(model, tmp_path)


def test_arguments_by_their_places(tmp_path):
    model = trained(make_llama)
    model.save_pretrained(tmp_path / "sparse", True, None, False, SHARDS, "half")
    assert list((tmp_path / "sparse").glob("model.half-*.safetensors"))
    make_llama().save_pretrained(tmp_path / "dense", True, None, False, SHARDS)
    assert list((tmp_path / "dense").glob("model-*.safetensors"))
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()


def test_an_offloaded_model_says_how_it_can_be_saved(tmp_path):
    model = trained(make_llama)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    for save in (model.save_pretrained, lambda folder: export_sparse(model, folder)):
        with pytest.raises(ValueError, match=r"'model\.layers\.0\..*meta device.*remove_hook_from_submodules"):
            save(tmp_path)
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_a_distributed_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="distributed_checkpoint=True.*Leave it out"):
        trained(make_llama).save_pretrained(tmp_path, distributed_checkpoint=True)


def test_an_export_takes_a_gathered_state_dict(tmp_path):
    model = trained(make_gpt2)
    gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    export_sparse(model, tmp_path / "own")
    export_sparse(model, tmp_path / "given", state_dict=gathered)
    own, given = (read_state(tmp_path / name) for name in ("own", "given"))
    assert own.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(own.tensors[key], given.tensors[key]) for key in own.tensors)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    model = trained(make_gpt2)
    with pytest.raises(ValueError, match="push_to_hub.*upload_folder"):
        export_sparse(model, tmp_path, push_to_hub=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_fc"], r=2, fan_in_fan_out=True))
    with pytest.raises(TypeError, match=r"PeftModel.*peft_model\.save_pretrained"):
        export_sparse(adapted, tmp_path)
    with pytest.raises(ValueError, match="adapters"):
        export_sparse(model, tmp_path)
    layers = sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), density=0.5, target_modules=["0"])
    with pytest.raises(TypeError, match="transformers model.*Sequential"):
        export_sparse(layers, tmp_path)
    assert not list(tmp_path.iterdir())

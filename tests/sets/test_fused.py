import pytest
import tiny_families
import torch
from torch import nn
from toy_models import make_gpt2, make_llama
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_topkast import sparsify
from hf_topkast.layers import layer_named
from hf_topkast.sets.fused import expert_parts, find_parts
from hf_topkast.surgery import sparse_layers


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FUSED = {
    "gpt2": {},
    "gpt_bigcode": {"multi_query": False},
    "gpt_bigcode-multi_query": {"multi_query": True},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {"multi_query": False, "alibi": False},
    "falcon-multi_query": {"multi_query": True, "alibi": False},
    "falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1},
    "phi3": {"num_key_value_heads": 2},
    "persimmon": {},
}


def make_family(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **{**SIZES, **FUSED[name]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def is_projection(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def fused_layer(model):
    """Name, module, and the parts of the only fused attention projection."""
    shapes = {}
    for name, module in model.named_modules():
        if is_projection(module) and "head" not in name.rpartition(".")[2]:
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            shapes[name] = tuple(weight.shape)
    parts = find_parts(model, shapes)
    ((name, rows),) = ((name, rows) for name, rows in parts.items() if len(rows) == 3)
    return model.get_submodule(name), rows


@torch.no_grad()
def set_rows(module, rows, value):
    """Fills rows of the (out, in) weight and of the bias."""
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    weight[rows] = value if not torch.is_tensor(value) else value[: weight[rows].numel()].view_as(weight[rows])
    if module.bias is not None:
        module.bias[rows] = 0


@pytest.mark.parametrize("family", FUSED)
def test_parts_are_the_query_the_key_and_the_value(family):
    tokens = torch.arange(10).view(1, 10)
    other = torch.randn(10**5, generator=torch.Generator().manual_seed(1))

    def outputs(*changes):
        model = make_family(family)
        module, rows = fused_layer(model)
        for part, value in changes:
            set_rows(module, rows[part], value)
        with torch.no_grad():
            return model(tokens).logits

    query, key, value = range(3)
    # Without values the attention gives nothing, whatever the scores are; without queries all scores are zero, and
    # without keys too. Each of these fails if a single row is in the wrong part, unless a query's row and the row of
    # the key that it is multiplied by have changed places, which these outputs cannot tell.
    torch.testing.assert_close(outputs((value, 0)), outputs((value, 0), (query, other), (key, other)))
    torch.testing.assert_close(outputs((query, 0)), outputs((query, 0), (key, other)))
    torch.testing.assert_close(outputs((key, 0)), outputs((key, 0), (query, other)))
    assert not torch.allclose(outputs((value, 0)), outputs((value, other)))
    assert not torch.allclose(outputs((query, other)), outputs((query, 0)))


@pytest.mark.parametrize("family", FUSED)
def test_every_row_is_in_one_part(family):
    module, rows = fused_layer(make_family(family))
    out_features = module.bias.numel() if module.bias is not None else module.weight.shape[0]
    places = torch.cat([torch.arange(out_features)[part] for part in rows])
    assert torch.equal(places.sort().values, torch.arange(out_features))


def test_gate_and_up_are_halves():
    parts = find_parts(make_family("phi3"), {"model.layers.0.mlp.gate_up_proj": (96, 32)})
    assert parts == {"model.layers.0.mlp.gate_up_proj": [slice(0, 48), slice(48, 96)]}


def test_each_part_gets_its_share_of_the_sets():
    model = sparsify(make_gpt2(), density=0.2, split_fused=True)
    for name, layer in sparse_layers(model):
        parts = 3 if name.endswith("c_attn") else 1
        for mask, density in ((layer.active_mask, 0.2), (layer.backward_mask, 0.4)):
            assert all(int(part.sum()) == round(density * part.numel()) for part in mask.chunk(parts, dim=1))


def refuse(model, match, shapes=None):
    with pytest.raises(ValueError, match=match):
        find_parts(model, shapes) if shapes else sparsify(model, density=0.2, split_fused=True)


def test_model_without_fused_layers_is_refused():
    refuse(make_llama(), "split_fused=True: LlamaForCausalLM has no fused projection")


def test_unknown_layouts_are_refused_by_name():
    refuse(make_gpt2(), "'transformer.h.0.attn.in_proj_qkvz' with 96", {"transformer.h.0.attn.in_proj_qkvz": (96, 24)})
    config = GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=48, add_cross_attention=True)
    refuse(GPT2LMHeadModel(config), r"'transformer\.h\.0\.crossattention\.c_attn' with 48")
    refuse(make_gpt2(), "'c_attn' with 71", {"c_attn": (71, 24)})
    config = AutoConfig.for_model("codegen", n_embd=32, n_layer=1, n_head=4, vocab_size=48, rotary_dim=4)
    refuse(AutoModelForCausalLM.from_config(config), "'transformer.h.0.attn.qkv_proj' with 96")
    refuse(nn.Sequential(nn.Linear(4, 12)), "'query_key_value' with 12", {"query_key_value": (12, 4)})


def test_parts_of_an_expert():
    assert expert_parts(4, None) == [slice(0, 4)]
    assert expert_parts(4, "halves") == [slice(0, 2), slice(2, 4)]
    assert [part.tolist() for part in expert_parts(6, "interleaved")] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("family", "key", "parts"),
    [
        ("mixtral", "mlp.experts.gate_up_proj", 2),
        ("mixtral", "mlp.experts.down_proj", 1),
        ("gpt_oss", "mlp.experts.gate_up_proj", 2),
        ("jetmoe", "mlp.input_linear.weight", 2),
        ("jetmoe", "self_attention.experts.input_linear.weight", 1),
        ("llama4_text", "feed_forward.experts.gate_up_proj", 2),
    ],
)
def test_experts_have_one_part_or_halves_if_they_are_split(family, key, parts):
    name = f"model.layers.1.{key}"
    for split in (False, True):
        for model in (tiny_families.make_family(family), sparsify(tiny_families.make_family(family), density=0.3)):
            layer = layer_named(model, name)
            found = find_parts(model, {name: layer.matrix_shape}, split) if parts > 1 or not split else None
            if found is None:
                refuse(model, "has no fused projection", {name: layer.matrix_shape})
                continue
            rows = [torch.arange(layer.out_features)[part] for part in found[name]]
            assert [len(part) for part in rows] == [layer.out_features // len(rows)] * (parts if split else 1)
            assert torch.equal(torch.cat(rows).sort().values, torch.arange(layer.out_features))


def test_blocks_over_gate_and_up_in_turn_are_refused():
    model = tiny_families.make_family("gpt_oss")
    with pytest.raises(ValueError, match=r"a block of 2 rows of layer 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"):
        sparsify(model, density=0.3, split_fused=True, block_size=[2, 2])
    sparsify(model, density=0.3, split_fused=True, block_size=[1, 2])

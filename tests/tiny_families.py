"""A tiny model of every family of causal language models that transformers knows."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 64


def _named(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# What the families' configurations call their sizes, and the size here where theirs is larger.
SIZES = {
    **_named("hidden_size n_embd d_model dim_model emb_dim embedding_size embedding_dim word_embed_proj_dim", 32),
    **_named("lru_width attention_hidden_size input_embedding_size output_embedding_size backbone_hidden_size", 32),
    **_named("out_hidden_size pronunciation_embed_dim shape_embed_dim", 32),
    **_named("intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size", 48),
    **_named("shared_expert_intermediate_size shared_intermediate_size dim_ff dff d_inner expert_ffn_hidden_size", 48),
    **_named("intermediate_size_mlp moe_shared_expert_intermediate_size shared_experts_intermediate_size", 48),
    **_named("feed_forward_size dense_intermediate_size", 48),
    **_named("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_named("num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads", 4),
    **_named("num_key_value_heads num_kv_heads swa_num_key_value_heads", 2),
    **_named("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", 2),
    **_named("num_decoder_layers num_blocks depth", 2),
    **_named("head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_size d_head", 8),
    **_named("attention_head_dim dim_head kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_named("hidden_size_per_layer_input rotary_dim", 8),
    **_named("linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads", 2),
    **_named("index_head_dim q_lora_rank kv_lora_rank o_lora_rank state_size mamba_d_state ssm_state_size", 16),
    **_named("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_named("first_k_dense_replace num_dense_layers", 1),
    # With the renormalised weight of one expert a router would have no gradient.
    **_named("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts", 2),
    **_named("topk_group n_group num_expert_group", 1),
    **_named("vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size", VOCABULARY),
    **_named("unpadded_vocab_size", VOCABULARY),
    **_named("shape_vocab_size max_position_embeddings n_positions n_ctx max_seq_len model_max_length", 64),
    **_named("context_length max_target_positions max_source_positions image_size encoder_hash_byte_group_vocab", 64),
    **_named("pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id sep_token_id", 1),
    **_named("eod_token_id boi_token_id eoi_token_id image_token_id video_token_id audio_token_id", 1),
}
HYBRID = {"num_hidden_layers": 4}  # the fewest layers with one of full attention among them
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
INDEXER |= {"indexer_compress_ratio": 2}
REFORMER = {"lsh_attn_chunk_length": 5, "local_attn_chunk_length": 5, "hash_seed": 0, "num_buckets": 2}
# What no rule finds, by model type.
OVERRIDES = {
    "bailing_hybrid": {"layer_group_size": 2},
    "big_bird": {"attention_type": "original_full"},  # which it switches to by itself, for short inputs
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "falcon_h1": MAMBA,
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": 48},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"num_hidden_layers": 6},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {**HYBRID, **INDEXER, "hc_lowrank": 8, "ple_embed_dim": 8, "ngram_vocab_size_base": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], **REFORMER},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_dt_rank": 4,
        "attention_head_dim": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "attention_head_dim": 16,
    },
}


def make_family(family: str, seed: int = 0) -> PreTrainedModel:
    """The causal language model of a family, of about 20,000 weights, without dropout, in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family]
    return AutoModelForCausalLM.from_config(config(**_shrunk(config))).eval()


def _shrunk(kind: type[PreTrainedConfig]) -> dict:
    """Settings that make a configuration tiny, and those of the configurations inside it."""
    overrides = OVERRIDES.get(kind.model_type, {})
    stock = kind()
    parts = {}
    for name in kind.sub_configs:
        part = getattr(stock, name, None)
        if isinstance(part, PreTrainedConfig):
            parts[name] = {"model_type": part.model_type, **_shrunk(type(part))}
    settings = stock.to_dict()
    sizes = {key: SIZES[key] for key, value in settings.items() if key in SIZES and _larger(value, SIZES[key])}
    if "kv_lora_rank" in settings and "num_key_value_heads" in sizes:  # latent attention: a key head for each head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    dropout = {key: 0.0 for key, value in settings.items() if "drop" in key and isinstance(value, float)}
    decoder = {"is_decoder": True} if "is_decoder" in settings else {}
    return {**sizes, **dropout, **decoder, **overrides, **parts}


def _larger(value, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > size

"""Tiny random models of every causal language model type that the installed transformers knows."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny_models import MAX_POSITIONS, VOCAB_SIZE

NUM_LAYERS = 6

_FIELDS_BY_SIZE: dict[Any, str] = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    MAX_POSITIONS: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length "
    "original_max_position_embeddings",
    NUM_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks",
    64: "intermediate_size n_inner ffn_dim dff dim_ff d_inner ffn_hidden_size decoder_ffn_dim "
    "feed_forward_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_ssm",
    32: "hidden_size n_embd d_model embedding_size emb_dim embedding_dim word_embed_proj_dim lru_width "
    "attention_hidden_size input_embedding_size output_embedding_size pronunciation_embed_dim "
    "shape_embed_dim ple_embed_dim moe_intermediate_size expert_ffn_hidden_size",
    8: "head_dim swa_head_dim kv_channels dim_head d_head global_head_dim attention_head_size "
    "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim q_lora_rank kv_lora_rank o_lora_rank adapter_rank hc_lowrank "
    "laurel_rank state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank mamba_n_heads "
    "mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim mamba_headdim rotary_dim "
    "hidden_size_per_layer_input chunk_size mamba_chunk_size block_size attention_chunk_size "
    "floor_scale query_pre_attn_scalar router_hidden_size d_rel rel_extent",
    5: "sliding_window window_size sliding_window_size attention_window_size",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "num_query_groups swa_num_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts index_topk index_topk_blocks linear_num_value_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k_experts index_n_heads linear_num_heads "
    "linear_num_key_heads eos_token_id eod_token_id",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num n_group topk_group "
    "num_expert_group mamba_n_groups mamba_ngroups n_groups bos_token_id",
    0: "pad_token_id",
    0.2: "initializer_range init_std",
}
SIZES = {name: size for size, names in _FIELDS_BY_SIZE.items() for name in names.split()} | {
    "is_decoder": True
}
"""A small value for every config field that is a size, whatever the family."""

_SLIDING = ["sliding_attention", "full_attention"] * 3
_LINEAR = ["linear_attention", "full_attention"] * 3
_GLOBAL_HEADS = {"layer_types": _SLIDING, "global_head_dim": 16}
_INDEXERS = ["full", "full", "shared", "full", "full", "full"]

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR},
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in dict.fromkeys(_SLIDING)
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"first_k_dense_replace": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING,
        "intermediate_size": [64] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": _GLOBAL_HEADS | {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": _GLOBAL_HEADS | {"use_bidirectional_attention": None},
    "glm_moe_dsa": {"indexer_types": _INDEXERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hy_v4": {"indexer_types": _INDEXERS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": [*_LINEAR[:2], "moe", "mlp", *_LINEAR[:2]]},
    "olmo_hybrid": {"layer_types": _LINEAR},
    "qwen3_5": {"layer_types": _LINEAR},
    "qwen3_5_moe": {"layer_types": _LINEAR},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_moe": {"mlp_only_layers": [1, 4]},
    "qwen3_next": {"layer_types": _LINEAR, "mlp_only_layers": [2]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 3,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"] * 3,
    },
    "rwkv": {"rescale_every": 2},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that are no sizes: kinds of layer in every mixture a family knows, and what its own checks ask."""


NOT_TINY = {
    "blt": "four models in one, of sizes that hang together",
    "dots3_note": "the config overrides its layers 25 to 41 by default",
    "gemma3n": "needs the timm library",
    "gemma4_assistant": "its config has no defaults",
    "musicgen": "audio codes, not text",
    "musicgen_melody": "audio codes, not text",
    "reformer": "reversible blocks, which no hook can skip",
    "whisper": "listens to audio",
}
"""Model types of which no tiny text model is built, and why."""


def decoder_types() -> list[str]:
    """Every causal language model type that is not an encoder with a decoder."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not _has_encoder(name))


def _has_encoder(model_type: str) -> bool:
    return getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False) is True


def tiny_decoder(model_type: str) -> PreTrainedModel:
    """A random fp32 model in eval mode: D=32, N=`NUM_LAYERS`, V=`VOCAB_SIZE`, windows of 5 tokens.

    Matrices are drawn wide, so that every layer changes the output by far more than rounding does.
    """
    config = tiny_decoder_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                # Some families set the row of the padding token to zero when they load.
                nn.init.zeros_(module.weight[module.padding_idx])
    return model.float().eval()


def tiny_decoder_config(model_type: str) -> PretrainedConfig:
    """The config of `tiny_decoder`; of a multimodal model, around that of its decoder."""
    fields = _small_fields(AutoConfig.for_model(model_type))
    special = SPECIAL.get(model_type, {})
    if isinstance(fields.get("text_config"), dict):
        fields["text_config"] |= special
        return AutoConfig.for_model(model_type, **fields)
    return AutoConfig.for_model(model_type, **fields | special)


def _small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config`, and of the configs in it, that are sizes, with small values."""
    known = vars(config)
    fields = {name: SIZES[name] for name in known if name in SIZES}
    if "kv_lora_rank" in fields:
        # Multi-head latent attention: as many key heads as heads.
        fields["num_key_value_heads"] = 4
    for name in getattr(config, "sub_configs", {}):
        if isinstance(known.get(name), PretrainedConfig):
            fields[name] = _small_fields(known[name])
    return fields

"""Tiny configurations of mlx-lm's architectures, each with what is particular to it."""

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
}
TIED = {"tie_word_embeddings": True}

_PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mistral3": {
        "text_config": {
            **COMMON,
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 512,
                "llama_4_scaling_beta": 0.1,
            },
        }
    },
    "gemma3_text": {
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 32,
        "rope_global_base_freq": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "phi3": {"num_key_value_heads": 4, "rope_scaling": None, "original_max_position_embeddings": 512},
    "cohere": {**TIED, "layer_norm_eps": 1e-5, "logit_scale": 0.1},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "lfm2": {
        **TIED,
        "num_hidden_layers": 4,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
}

#: those that bank, slices and batched decoding hold on
ARCHITECTURES = {name: {**COMMON, **extra, "model_type": name} for name, extra in _PARTICULAR.items()}

#: whose batched attention mask mlx-lm has wrong
GEMMA2 = {
    **COMMON,
    **TIED,
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 32,
}

#: names that mean attention projections in all of them
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj")

"""Tiny random models of the families that are trained today, by the config classes of transformers."""

import torch
from tiny_models import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
_EXPERTS |= {"n_routed_experts": 4, "n_shared_experts": 1}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_LATENT |= {"head_dim": 8, "num_key_value_heads": 4}
_MAMBA = {"mamba_d_state": 16, "mamba_d_head": 16, "mamba_chunk_size": 16}
_LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
_TURNS = ["sliding_attention", "full_attention"] * 2
_LAYERS = ["mamba", "attention", "mamba", "attention"]
_NO_ATTENTION = {"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None}

# By `model_type` of transformers: the values of its config besides the sizes.
FAMILIES = {
    "llama": {},
    "llama4_text": {**_LLAMA4, "attention_chunk_size": 64},
    "mistral": {},
    "ministral3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "gemma3_text": {"sliding_window": 32},
    "gemma4_text": {
        **{"sliding_window": 32, "global_head_dim": 32, "num_kv_shared_layers": 2, "layer_types": _TURNS},
        **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY},
    },
    "glm4": {},
    "glm4_moe": {**_EXPERTS, "first_k_dense_replace": 1},
    "gpt_oss": {**_EXPERTS, "sliding_window": 32},
    "deepseek_v3": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "phi3": {},
    "olmo3": {},
    "smollm3": {},
    "granite": {},
    "granitemoehybrid": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "mamba_n_heads": 8},
        **{"layer_types": _LAYERS, "layers_block_type": _LAYERS, **_MAMBA},
    },
    "seed_oss": {},
    "cohere2": {"sliding_window": 32},
    "exaone4": {"sliding_window": 32},
    "lfm2": {"full_attn_idxs": [1, 3], "block_multiple_of": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_expand": 1, **_MAMBA},
    "mamba2": {"num_heads": 8, "chunk_size": 16, "state_size": 16, "expand": 2, "n_groups": 1, **_NO_ATTENTION},
}


def family_config(family: str, **sizes: int) -> PretrainedConfig:
    """The config of a tiny model of a family."""
    given = {**_SIZES, **FAMILIES[family], **sizes}
    return AutoConfig.for_model(family, **{name: value for name, value in given.items() if value is not None})


# Wrappers with a vision tower, as the hub has them: by `model_type` their text part, and the sizes of the tower.
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_POSITIONS = {"position_embedding_size": 64}
_PATCHES = {"image_size": 28, "patch_size": 14}
_VISUAL = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
_VISUAL |= {"num_position_embeddings": 16}
WRAPPERS = {
    "qwen3_5": ("qwen3_5_text", "qwen3_5", _VISUAL),
    "gemma3": ("gemma3_text", "siglip_vision_model", {**_TOWER, **_PATCHES}),
    "gemma4": ("gemma4_text", "gemma4_vision", {**_TOWER, **_POSITIONS, "num_key_value_heads": 2, "head_dim": 16}),
    "mistral3": ("ministral3", "pixtral", {**_TOWER, **_PATCHES, "head_dim": 16}),
}


def wrapper_config(wrapper: str) -> PretrainedConfig:
    """The config of a tiny wrapper."""
    text, vision, sizes = WRAPPERS[wrapper]
    if vision == wrapper:  # its tower's config has no name of its own
        vision_config = {**AutoConfig.for_model(wrapper).vision_config.to_dict(), **sizes}
    else:
        vision_config = AutoConfig.for_model(vision, **sizes).to_dict()
    return AutoConfig.for_model(wrapper, text_config=family_config(text).to_dict(), vision_config=vision_config)


def build_family(family: str, std: float = 0.05, **sizes: int) -> PreTrainedModel:
    """A random model of a family or a wrapper, in float32 and in `eval` mode."""
    torch.manual_seed(0)
    if family in WRAPPERS:
        model = AutoModelForImageTextToText.from_config(wrapper_config(family)).eval()
    else:
        model = AutoModelForCausalLM.from_config(family_config(family, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(std=std)
    return model

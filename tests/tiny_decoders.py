"""Adapted models of all families whose layers are known, and rollouts of them."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, build_model
from transformers import AutoModelForCausalLM, MistralConfig

from hybrid_lightning.engine.decoder import fast_decoder
from hybrid_lightning.engine.fused_layers import use_fused_layers, use_fused_rotary
from hybrid_lightning.engine.fused_lora import use_fused_lora
from hybrid_lightning.engine.passes import FAST_PASS, base_model
from hybrid_lightning.engine.prepacked import prepacked_weights
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.types import Prompt

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = ("12+3=", "4=", "1-2-3-4-5=")


def build(family, targets=ALL, **settings):
    """A model with LoRA on some projections; for SOME one more is trained fully, and two are frozen."""
    if family == "mistral":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=3, **sizes, pad_token_id=0)
        )
        model = model.requires_grad_(False).eval()
    else:
        model = build_model(family)
    full = {"modules_to_save": ["model.layers.0.self_attn.v_proj"]} if targets == SOME else {}
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **full, **settings)
    ).eval()
    use_fused_lora(model)
    use_fused_layers(model)
    use_fused_rotary(model)
    return model


def sampled(model, tokenizer, passes):
    """Tokens and log-probabilities of rollouts, and whether each forward pass had a pass by plain calls."""
    prompts, ids = [Prompt(text=text) for text in TEXTS], [tokenizer(text).input_ids for text in TEXTS]
    embedded = base_model(model).get_input_embeddings()
    hook = embedded.register_forward_hook(lambda *_: passes.append(FAST_PASS in base_model(model).get_decoder().__dict__))
    try:
        draws = torch.Generator().manual_seed(3)
        rollouts = Sampler(max_new_tokens=12).sample(model, tokenizer, prompts, ids, 4, generator=draws)
    finally:
        hook.remove()
    return rollouts.sequences.completion_ids, rollouts.sampling_logprobs


def has_pass(model):
    with torch.no_grad(), prepacked_weights(model), fast_decoder(model):
        return FAST_PASS in base_model(model).get_decoder().__dict__

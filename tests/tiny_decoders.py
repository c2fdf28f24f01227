"""Engines of adapted models of all families with known layers, and rollouts by them."""

import copy

import segments_on_cpu  # noqa: F401  (which makes `OfAccelerator` possible)
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES, build_model

from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.runner import Backend, ModelRunner, base_model, use_fused_modules
from hybrid_lightning.types import Prompt

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = ("12+3=", "4=", "1-2-3-4-5=")
WINDOW = {"sliding_window": 3, "head_dim": 8}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 8}
# Families with something special: sliding windows, caps of scores and logits, scaled logits.
SPECIAL = {
    "mistral": transformers.MistralConfig(**SIZES, **WINDOW),
    # Eager, since the sdpa of older transformers leaves its cap of the scores out without a word.
    "gemma2": transformers.Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=2.0, attn_implementation="eager"),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0, attention_multiplier=0.3),
    "phi3": transformers.Phi3Config(**SIZES),  # one projection to queries, keys and values
    "olmo2": transformers.Olmo2Config(**SIZES),  # its norms are of all heads together
}


def special_model(config, std=0.2):
    """A model of a family that `build_model` does not have, with random weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))  # which changes it
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False).eval()


class OfAccelerator(Backend):
    """Attends by segments, and has no operators of a CPU."""

    def usable(self, *tensors):
        return False

    def why_no_segments(self, device, dtype):
        return ""

    def is_cpu(self, device):
        return False

    def copies_pay(self, device):
        return True


def build(family, targets=ALL, **settings):
    """The runner of a model with LoRA on some projections; for SOME one more is trained fully, and two are frozen."""
    model = special_model(SPECIAL[family]) if family in SPECIAL else build_model(family)
    full = {"modules_to_save": ["model.layers.0.self_attn.v_proj"]} if targets == SOME else {}
    adapter = LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **full, **settings)
    return fused(get_peft_model(model, adapter).eval())


def fused(model, backend=None):
    """The runner of a model, with fused layers."""
    runner = ModelRunner(model, backend)
    use_fused_modules(model, runner.backend)
    return runner


def sampled(runner, tokenizer, passes):
    """Tokens and log-probabilities of rollouts, and whether each forward pass had a pass by plain calls."""
    prompts, ids = [Prompt(text=text) for text in TEXTS], [tokenizer(text).input_ids for text in TEXTS]
    embedded = base_model(runner.model).get_input_embeddings()
    hook = embedded.register_forward_hook(lambda *_: passes.append(runner._pass is not None))
    try:
        request = SamplingRequest(prompts, ids, 4, torch.Generator().manual_seed(3))
        rollouts = Sampler(max_new_tokens=12).sample(runner, tokenizer, request)
    finally:
        hook.remove()
    return rollouts.sequences.completion_ids, rollouts.sampling_logprobs


def has_pass(runner):
    with torch.no_grad(), runner.sampling():
        return runner._pass is not None

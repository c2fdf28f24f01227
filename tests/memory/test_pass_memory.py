"""The memory of passes in closed form, compared with counted memory of models of many families."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_families import family_config
from tiny_memory import Case
from tiny_models import FAMILIES, VOCABULARY, build_model

from benchmarks.live_tensors import LiveTensors
from benchmarks.memory import plan_qwen3
from hybrid_lightning.memory import plan_memory
from hybrid_lightning.memory.memory_table import memory_notes
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.runner import Backend, ModelRunner, TokenSizes, default_token_budget, tokens_of_pass, use_fused_layers
from hybrid_lightning.runner.activations import Rows
from hybrid_lightning.runner.pass_memory import PassMemory
from hybrid_lightning.types import Sequences

SETTINGS = Case(more={"prompts_per_rollout": 4}).settings()
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1}
SIZES |= {"eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
RECURRENT = ["linear_attention", "full_attention", "linear_attention"]
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 32, "mamba_chunk_size": 32, "mamba_n_groups": 1}
# Families that `tiny_models` does not have, and why the plan bounds their memory.
MORE = {
    "qwen3_5": (transformers.Qwen3_5TextConfig(**SIZES, **HEADS, **LINEAR, layer_types=RECURRENT), "recurrent layers"),
    "gpt_oss": (
        transformers.GptOssConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2),
        "its attention has sinks",
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(**SIZES, **HEADS, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
        "the 2 experts",
    ),
    "mamba": (transformers.MambaConfig(**SIZES, state_size=8), "recurrent layers"),
    "mamba2": (
        transformers.Mamba2Config(**SIZES, state_size=32, num_heads=8, head_dim=16, n_groups=1, chunk_size=32),
        "recurrent layers",
    ),
    "bamba": (transformers.BambaConfig(**SIZES, **HEADS, **STATES, attn_layer_indices=[1]), "recurrent layers"),
    "gemma2": (transformers.Gemma2Config(**SIZES, **HEADS), "does not fuse"),
    "phi3": (transformers.Phi3Config(**SIZES, **HEADS), ""),
    "deepseek_v3": (family_config("deepseek_v3"), "the 2 experts"),
    "gemma4": (family_config("gemma4_text"), "does not fuse"),
    "glm4_moe": (family_config("glm4_moe"), "the 2 experts"),
    "lfm2": (family_config("lfm2"), "its conv layers"),
    "llama4": (family_config("llama4_text"), "the 4 experts"),  # all of a layer, for each token
    "qwen3_next": (family_config("qwen3_next"), "recurrent layers"),
}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_is_planned_and_what_is_a_bound_is_named(family):
    config, bound = MORE[family] if family in MORE else (build_model(family).config, "does not fuse" if "g" in family else "")
    methods = plan_memory(replace(SETTINGS, config=config, prompt_tokens=5))
    found = methods[0].largest_components
    assert found.activations > 0 and found.logits > 0 and found.cache > 0
    notes = memory_notes(methods, SETTINGS)
    assert bound in notes and ("Bounded from above" in notes) is bool(bound), notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name, (_, bound) in MORE.items() if bound])
def test_layers_keep_no_more_than_the_bound_and_not_much_less(family, dtype):
    config, _ = MORE[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
    use_fused_layers(model, Backend())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.requires_grad_(True)

    def kept(rows):
        with LiveTensors() as live:
            live.count(model.parameters())
            begin = live.bytes
            hidden = model.base_model(input_ids=torch.randint(3, VOCABULARY, (rows, 64)), use_cache=False)[0]
            kept_bytes = live.bytes - begin
            del hidden
        return kept_bytes

    counted = (kept(3) - kept(1)) / (2 * 64)  # of a token, without what does not grow with them
    passes = PassMemory(meta_model(config, dtype), dtype.itemsize, on_cpu=True)
    bound = sum(passes.kept(recurs, 64, None) for recurs in passes.sizes.recurs)
    assert counted < bound + 2 * 64 * dtype.itemsize < 3 * counted


@pytest.mark.parametrize("family", ["qwen3_5", "gpt_oss", "mamba2", "bamba"])
def test_a_padded_pass_reads_prompts_once_and_keeps_no_more_than_the_bound(family):
    config, _ = MORE[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.requires_grad_(True)
    runner = ModelRunner(model)
    runner.prepare()
    prompts, completions = (torch.randint(3, VOCABULARY, (8, length)) for length in (100, 24))
    prompts = prompts[:2].repeat_interleave(4, dim=0)
    sequences = Sequences(prompts, torch.ones_like(prompts).bool(), completions, torch.ones_like(completions).bool())
    with LiveTensors() as live:
        live.count(model.parameters())
        begin = live.bytes
        hidden = runner.predicting(sequences)
        counted = live.bytes - begin
        del hidden
    passes = PassMemory(meta_model(config, torch.float32), 4, on_cpu=True)
    planned = passes.training(Rows(2, 8, 100, 24), None).activations
    assert counted < planned < 3.5 * counted
    assert planned < 0.8 * passes.training(Rows(8, 8, 100, 24), None).activations, "than with as many prompts"


def test_the_backward_pass_of_attention_counts_copies_of_its_sums_where_there_are_few_rows():
    """Gigabytes of Qwen3-0.6B on an H100: at 30 completions, and for one of 16,000 tokens."""
    config = plan_qwen3.config("Qwen3-0.6B")
    passes = PassMemory(meta_model(config, torch.bfloat16), 2, on_cpu=False)
    many, one = (passes._workspace(rows) / 1e9 for rows in (Rows(4, 30, 384, 256), Rows(1, 1, 384, 16_000)))
    assert 0.15 < many < 0.25 and 1.2 < one < 1.4
    assert passes.training(Rows(1, 1, 384, 16_000), None).backward > 1e9 * one


def test_a_part_of_the_tokens_keeps_a_part_of_the_activations():
    def activations(settings, rows):
        return plan_method(replace(settings, schedule=replace(settings.schedule, samples_per_prompt=rows))).peaks["updating"]

    whole, half = (activations(SETTINGS, rows).activations for rows in (8, 4))
    assert 0.45 < half / whole < 0.6
    assert activations(replace(SETTINGS, gradient_checkpointing=True), 8).activations < 0.5 * whole
    several = replace(SETTINGS, max_tokens_per_micro_batch=100)
    assert activations(several, 8).activations < 0.5 * whole, "cut as in training"


def test_the_plan_takes_the_passes_that_the_engine_takes():
    model = build_model("llama")
    assert replace(SETTINGS, config=model.config).tokens_of_pass() == default_token_budget(model, torch.device("cpu"))
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    assert tokens_of_pass(transformers.LlamaConfig(**sizes), recomputes=False, on_cpu=True) == 670, "what bits depend on"


def test_sizes_that_families_call_differently():
    deepseek = TokenSizes(transformers.DeepseekV3Config())
    assert (deepseek.keys, deepseek.values) == (128 * (128 + 64), 128 * 128), "cached for all heads"
    assert (deepseek.experts, deepseek.expert_inner, deepseek.inner) == (8, 2048, 2048), "and one that all tokens share"
    jamba, mixed = TokenSizes(transformers.JambaConfig()), TokenSizes(transformers.FalconH1Config(num_hidden_layers=2))
    assert jamba.attending == 4 and sum(jamba.recurs) == 28 and (mixed.attending, sum(mixed.recurs)) == (2, 2)
    assert TokenSizes(transformers.Gemma3nTextConfig()).inner == 16_384, "the widest layer's"
    assert TokenSizes(transformers.MiniMaxConfig(layer_types=["linear_attention"] * 32)).kept(True).wide > 0

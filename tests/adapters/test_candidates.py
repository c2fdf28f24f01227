import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lightning.adapters.candidates import (
    candidate_shape,
    find_candidates,
    linear_shape,
    module_group,
    ranks_by_pattern,
    share_of_experts,
)
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.errors import ConfigError, ModelError

PER_LAYER = {"llama": 7, "qwen2": 7, "qwen3": 7, "gemma": 7, "gpt2": 4}


@pytest.mark.parametrize("family", PER_LAYER)
def test_all_linear_modules_of_the_blocks_and_nothing_else(make_model, family):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    candidates = find_candidates(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(candidates) == 2 * PER_LAYER[family] and {module_group(name) for name in candidates} == {"attention", "mlp"}
    assert all(model.get_submodule(name) is module for name, module in candidates.items())
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in candidates)
    if family == "gpt2":
        module = candidates["transformer.h.0.attn.c_attn"]
        assert tuple(module.weight.shape) == (32, 96) and linear_shape(module) == (96, 32), "outputs by inputs"
        assert linear_shape(nn.Linear(5, 3)) == (3, 5)


def test_target_modules_match_ends_of_names_at_a_dot(make_model):
    model = make_model("llama")
    expected = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert list(find_candidates(model, ["q_proj", "mlp.up_proj"])) == expected
    for targets, message in (
        (["q_proj", "proj"], r"'proj' matches no candidate.*down_proj, gate_proj, k_proj"),
        (["lm_head"], "lm_head"),
        ("q_proj", "give a list"),
        ([], "give a list"),
    ):
        with pytest.raises(ModelError, match=message):
            find_candidates(model, targets)


def test_shared_weights_are_no_candidates_and_a_model_without_any_or_with_an_adapter_is_refused():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model.layers[2].weight = model.layers[0].weight
    assert list(find_candidates(model)) == ["layers.1"]
    model.embedding = nn.Embedding(4, 4)
    model.embedding.weight = model.layers[1].weight
    with pytest.raises(ModelError, match="no linear module inside"):
        find_candidates(model)
    with pytest.raises(ModelError, match="no linear module inside"):
        find_candidates(nn.Sequential(nn.Linear(2, 2)))
    adapted = nn.Linear(2, 2)
    adapted.peft_config = {}
    with pytest.raises(ModelError, match="already has"):
        find_candidates(adapted)


# ---- ranks by the ends of names


def test_groups_of_modules():
    for name, group in {
        "transformer.h.3.attn.c_attn": "attention",
        "gpt_neox.layers.1.attention.query_key_value": "attention",
        "model.decoder.layers.2.fc1": "mlp",
        "model.layers.0.block_sparse_moe.gate": "mlp",
        "backbone.layers.0.mixer.in_proj": None,
    }.items():
        assert module_group(name) == group


def test_the_longest_name_decides():
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.1.x"]
    pattern = {"1.mlp.up_proj": 2, "mlp": 8, "up_proj": 5, "attention": 0}
    expected = dict(zip(names, [0, 5, 2, 8, 16], strict=True))
    assert ranks_by_pattern(names, pattern, 16) == expected
    assert ranks_by_pattern(names, dict(reversed(pattern.items())), 16) == expected
    assert set(ranks_by_pattern(names, {}, 7).values()) == {7}
    read_by_kernels = ["layers.0.mixer.out_proj", "layers.0.mixer.in_proj", "layers.1.conv.out_proj"]
    assert [*ranks_by_pattern(read_by_kernels, {"out_proj": 5}, 7).values()] == [0, 7, 5], "no LoRA past Mamba's kernels"


def test_impossible_ranks_and_keys_that_match_nothing_are_refused():
    names = ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]
    for rank in (-1, 1.5, True, "8"):
        with pytest.raises(ConfigError, match=r"rank_pattern: mlp=.* is not a rank; give a whole number"):
            ranks_by_pattern(names, {"mlp": rank}, 4)
    for key in ("_proj", "attention"):
        with pytest.raises(ModelError, match=rf"rank_pattern: '{key}' matches no candidate .*\(it has mlp\)"):
            ranks_by_pattern(names, {"mlp": 2, key: 3}, 4)


def test_experts_and_routers_are_candidates_only_if_they_are_named(make_model):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **sizes, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert share_of_experts(model) == 4 * 3 * 16 * 8 / total and share_of_experts(make_model("llama")) == 0
    name, linear = "model.layers.0.mlp.experts", [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    assert share_of_experts(model, [name]) == 0 and list(find_candidates(model)) == linear
    for key in ("experts", "mlp.experts", name):
        assert list(find_candidates(model, named=[key])) == [*linear, name]
    assert list(find_candidates(model, ["q_proj", "experts"])) == [linear[0], name]
    shape = {"gate_up_proj": (4, 16, 16), "down_proj": (4, 16, 8)}
    assert candidate_shape(model.get_submodule(name)) == shape
    assert LoraSettings(rank=2).parameters(shape) == 2 * 4 * (16 + 16 + 16 + 8), "each expert has the whole rank"
    router = "model.layers.0.mlp.gate"
    assert list(find_candidates(model, ["gate"])) == [router]
    assert candidate_shape(model.get_submodule(router)) == {"weight": (4, 16)}
    assert LoraSettings(rank=2).parameters({"weight": (4, 16)}) == 2 * (4 + 16)
    with pytest.raises(ModelError, match=r"'router' matches no candidate module; give one of experts, gate, k_proj"):
        find_candidates(model, ["router"])
    routed = AutoConfig.for_model("llama4_text", **sizes, intermediate_size=8, num_local_experts=2, interleave_moe_layer_step=1)
    with torch.device("meta"):
        candidates = find_candidates(AutoModelForCausalLM.from_config(routed))
    assert candidates and not any("router" in name for name in candidates), "which returns two tensors"
    with torch.device("meta"):
        convolved = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    assert share_of_experts(convolved) == 0

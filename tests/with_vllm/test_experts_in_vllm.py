"""Trained experts in vLLM: after a sync it computes what the policy computes."""

import dataclasses

import pytest
from tiny_families import build_family
from tiny_models import build_tokenizer
from vllm_of_tests import largest_difference, move, needs_vllm, policy_of

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.rollout import VLLMSampler
from hybrid_lightning.types import Prompt

pytestmark = needs_vllm
PROMPTS = [Prompt(text=text, index=index) for index, text in enumerate(("12+3=", "9=", "abc"))]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_sent_as_a_checkpoint_has_them(tmp_path, family):
    build_family(family, std=0.1, hidden_size=128, head_dim=32, num_hidden_layers=2).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    sampler = VLLMSampler(max_new_tokens=12)
    policy = policy_of(sampler, tmp_path)
    plan = plan_of_budget(find_candidates(policy.model, named=["experts"]), ModuleBudget(0), LoraSettings(4, 8), {"experts": 3})
    full = [module.name for module in plan.candidates if module.experts][-1]
    modules = (dataclasses.replace(m, mode="full", rank=None) if m.name == full else m for m in plan.candidates)
    policy.adapt(dataclasses.replace(plan, candidates=tuple(modules), model_digest=policy.policy.base_digest))
    for seed in range(3):
        assert largest_difference(policy, policy.generate(PROMPTS, 4)) < 3e-4
        move(policy, seed)
    with policy.policy.start_policy():
        start = policy.generate(PROMPTS, 4)
        assert largest_difference(policy, start) < 1e-4, "without the adapter"
    assert largest_difference(policy, start) > 1e-2, "the move has to be seen"
    sampler.shut_down()

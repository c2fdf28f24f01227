"""A vLLM server as a teacher."""

import torch
from vllm_of_tests import needs_vllm, own_logprobs, policy_of

from hybrid_lightning.losses import SampledReverseKL
from hybrid_lightning.policy import ServerTeacher
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt


@needs_vllm
def test_a_server_teaches_what_the_same_weights_teach_here(model, server, tmp_path):
    sampler = VLLMServerSampler(max_new_tokens=12, urls=[server.url])
    policy = policy_of(sampler, model, "hybrid")  # the server receives its weights
    prompts = [Prompt(text=text, index=n) for n, text in enumerate(("12+3=", "abc", "what is 7?"))]
    rollouts = policy.task.generation.generate(prompts, 4, PromptDraws(prompts, 4, 0))
    teacher = ServerTeacher(server.url, cache_dir=str(tmp_path / "cache"))
    teacher.check(policy.task.passes, SampledReverseKL())
    found = teacher.logprobs(policy.task.passes, rollouts.sequences)
    mask = rollouts.sequences.sampled_mask
    torch.testing.assert_close(found[mask], own_logprobs(policy, rollouts)[mask], atol=1e-3, rtol=1e-3)
    assert not found[~mask].any() and (found[mask] < 0).all()

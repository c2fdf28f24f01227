"""What a vLLM server says as a teacher is what the same model says here."""

from pathlib import Path

import torch
from vllm_of_tests import Server, needs_vllm, policy_of

from hybrid_lightning.losses import SampledReverseKL
from hybrid_lightning.policy import ModelTeacher, ServerTeacher
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt


@needs_vllm
def test_a_server_teaches_what_the_same_model_teaches_here(model: Path, tmp_path: Path):
    policy = policy_of(Sampler(max_new_tokens=12), model, "hybrid")  # whose weights are others than the teacher's
    passes, prompts = policy.task.passes, [Prompt(text=text, index=n) for n, text in enumerate(("12+3=", "abc", "what is 7?"))]
    sequences = policy.task.generation.generate(prompts, 4, PromptDraws(prompts, 4, 0)).sequences
    server = Server(model, tmp_path / "log.txt")
    try:
        teacher = ServerTeacher(server.url, cache_dir=str(tmp_path / "cache"))
        teacher.check(passes, SampledReverseKL())
        found = teacher.logprobs(passes, sequences)
    finally:
        server.stop()
    wanted, mask = ModelTeacher(str(model)).logprobs(passes, sequences), sequences.sampled_mask
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-3, rtol=1e-3)
    assert not found[~mask].any() and (found[mask] < 0).all()

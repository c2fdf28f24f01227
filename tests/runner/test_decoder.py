"""A decoder's pass by plain calls gives what its own pass gives, bit for bit, and leaves all else to that."""

import pytest
import torch
from tiny_decoders import ALL, SOME, build, sampled

from hybrid_lightning.runner import decoder as decoders


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize(
    ("family", "targets", "autocast"),
    [
        ("llama", ALL, False),
        ("llama", SOME, True),
        ("qwen2", ("q_proj", "v_proj"), True),
        ("qwen3", SOME, False),
        ("mistral", ALL, True),
    ],
)
def test_rollouts_are_the_same(family, targets, autocast, tokenizer, monkeypatch):
    runner = build(family, targets)
    dtype = torch.bfloat16 if autocast else None

    def rollouts():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), runner.sampling(dtype):
            return sampled(runner, tokenizer, passes)

    passes = []
    fast = rollouts()
    assert all(passes) and len(passes) > 5 and runner._pass is None
    passes.clear()
    monkeypatch.setattr(decoders.FastDecoder, "new_pass", lambda *_: None)
    own = rollouts()
    assert not any(passes) and len(passes) > 5
    assert all(torch.equal(one, other) for one, other in zip(fast, own, strict=True))

"""A decoder's pass by plain calls gives what its own pass gives, bit for bit, and leaves all else to that."""

import pytest
import torch
from tiny_decoders import ALL, SOME, build, has_pass, sampled
from tiny_runs import fit, write_model, write_sums

from hybrid_lightning.engine import decoder as decoders
from hybrid_lightning.engine.passes import base_model


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize(
    ("family", "targets", "autocast"),
    [("llama", ALL, False), ("llama", SOME, True), ("qwen2", ALL, True), ("qwen3", SOME, False), ("mistral", SOME, True)],
)
def test_rollouts_are_the_same(family, targets, autocast, tokenizer, monkeypatch):
    engine = build(family, targets)
    dtype = torch.bfloat16 if autocast else None

    def rollouts():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), engine.sampling(dtype):
            return sampled(engine, tokenizer, passes)

    passes = []
    fast = rollouts()
    assert all(passes) and len(passes) > 5 and engine._pass is None
    passes.clear()
    monkeypatch.setattr(decoders.FastDecoder, "new_pass", lambda *_: None)
    own = rollouts()
    assert not any(passes) and len(passes) > 5
    assert all(torch.equal(one, other) for one, other in zip(fast, own, strict=True))


def test_a_policy_samples_by_it(tmp_path, monkeypatch):
    calls, original = [], decoders._plain_pass
    monkeypatch.setattr(decoders, "_plain_pass", lambda *parts: calls.append(len(parts[1])) or original(*parts))
    fit(write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl"), tmp_path / "runs", max_steps=2)
    assert len(calls) >= 3 and set(calls) == {2}, "of the trial, and of each rollout"


@pytest.mark.parametrize("name", ["", "layers.1", "layers.0.self_attn", "layers.1.mlp.gate_proj", "norm"])
def test_modules_that_somebody_watches_are_called(name):
    engine = build("llama")
    assert has_pass(engine)
    handle = base_model(engine.model).get_decoder().get_submodule(name).register_forward_hook(lambda *_: None)
    assert not has_pass(engine)
    handle.remove()
    assert has_pass(engine)


def test_a_pass_that_gives_other_numbers_is_not_used(monkeypatch, caplog):
    engine, original = build("llama"), decoders._PlainLayer.output
    monkeypatch.setattr(decoders._PlainLayer, "output", lambda *parts: original(*parts) * 1.001)
    assert not has_pass(engine) and "gave other numbers" in caplog.text
    monkeypatch.setattr(decoders._PlainLayer, "output", original)
    assert not has_pass(engine), "it is tried once"
    assert "gave other numbers" in engine.passes()["fast decoding"]

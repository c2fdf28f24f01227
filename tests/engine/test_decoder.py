"""A decoder's pass by plain calls gives what its own pass gives, bit for bit, and leaves all else to that."""

import pytest
import torch
from tiny_decoders import ALL, SOME, build, has_pass, sampled
from tiny_runs import fit, write_model, write_sums

from hybrid_lightning.engine import decoder as decoders
from hybrid_lightning.engine.decoder import fast_decoder
from hybrid_lightning.engine.passes import FAST_PASS, base_model, packed_hidden
from hybrid_lightning.engine.prepacked import prepacked_weights


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("targets", [ALL, SOME], ids=["lora", "hybrid"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_rollouts_are_the_same(family, targets, autocast, tokenizer):
    model = build(family, targets)
    dtype = torch.bfloat16 if autocast else None
    found, passes = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), prepacked_weights(model, dtype):
        found.append(sampled(model, tokenizer, passes))
        assert not any(passes)
        passes.clear()
        with fast_decoder(model):
            found.append(sampled(model, tokenizer, passes))
    assert all(passes) and len(passes) > 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert FAST_PASS not in base_model(model).get_decoder().__dict__


def test_a_policy_samples_by_it(tmp_path, monkeypatch):
    calls, original = [], decoders._plain_pass
    monkeypatch.setattr(decoders, "_plain_pass", lambda decoder, layers: calls.append(len(layers)) or original(decoder, layers))
    fit(write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl"), tmp_path / "runs", max_steps=2)
    assert len(calls) >= 3 and set(calls) == {2}, "of the trial, and of each rollout"


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_other_families_keep_their_own_pass(family):
    assert not has_pass(build(family, ("c_attn",) if family == "gpt2" else ALL))


@pytest.mark.parametrize("name", ["", "layers.1", "layers.0.self_attn", "layers.1.mlp.gate_proj", "norm"])
def test_modules_that_somebody_watches_are_called(name):
    model = build("llama")
    assert has_pass(model)
    handle = base_model(model).get_decoder().get_submodule(name).register_forward_hook(lambda *_: None)
    assert not has_pass(model)
    handle.remove()
    assert has_pass(model)


def test_a_disabled_adapter_is_left_out():
    model = build("llama")
    assert has_pass(model)
    ids, positions, packing = torch.arange(3, 19), torch.arange(16), First()
    with torch.no_grad():
        with model.disable_adapter():
            expected = packed_hidden(model, ids, positions, packing)
        with prepacked_weights(model), fast_decoder(model):
            assert not torch.equal(packed_hidden(model, ids, positions, packing), expected)
            with model.disable_adapter():
                assert torch.equal(packed_hidden(model, ids, positions, packing), expected)


class First:
    """A packing in which every token sees the first one alone."""

    def attend(self, layer, query, key, value, window, settings):
        return value[:1].repeat_interleave(query.shape[1] // value.shape[1], dim=1).expand_as(query)


def test_a_pass_that_gives_other_numbers_is_not_used(monkeypatch, caplog):
    model, original = build("llama"), decoders._PlainLayer.output
    monkeypatch.setattr(decoders._PlainLayer, "output", lambda *parts: original(*parts) * 1.001)
    assert not has_pass(model) and "gave other numbers" in caplog.text
    monkeypatch.setattr(decoders._PlainLayer, "output", original)
    assert not has_pass(model), "it is tried once"

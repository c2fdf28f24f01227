"""A decoder's pass by plain calls gives what its own pass gives, bit for bit, and leaves all else to that."""

import pytest
import torch
from tiny_decoders import ALL, SOME, build, has_pass, sampled

from hybrid_lightning.engine import decoder as decoders
from hybrid_lightning.engine.passes import base_model
from hybrid_lightning.types import Sequences


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


@pytest.mark.parametrize("name", ["", "layers.1", "layers.0.self_attn", "layers.1.mlp.gate_proj", "norm"])
def test_modules_that_somebody_watches_are_called(name):
    engine = build("llama")
    assert has_pass(engine)
    handle = base_model(engine.model).get_decoder().get_submodule(name).register_forward_hook(lambda *_: None)
    assert not has_pass(engine)
    handle.remove()
    assert has_pass(engine)


@pytest.mark.parametrize("fast", [True, False])
def test_hidden_states_of_the_tokens_that_are_wanted(fast, monkeypatch):
    engine = build("llama")
    if not fast:
        monkeypatch.setattr(decoders.FastDecoder, "new_pass", lambda *_: None)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])
    with torch.no_grad(), engine.sampling():
        packed = engine.packed(Sequences(ids, ids > 2, ids[:, :0], ids[:, :0] > 2), completions=False)
        every = engine.hidden(packed.ids, packed.positions, packed)
        some = torch.tensor([3, 6])
        torch.testing.assert_close(engine.hidden(packed.ids, packed.positions, packed, some), every[some])

"""Attention layers that compute what Llama's do get one operator for rotary embeddings, and all others stay as they are."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rounding import additions_of, assert_same_sums
from tiny_decoders import SPECIAL, special_model
from tiny_models import FAMILIES, build_model
from transformers.models.llama import modeling_llama

from hybrid_lightning.runner import Backend, ModelRunner, PackedSequences, fused_attention, own_hidden
from hybrid_lightning.runner.attention_hook import use_packing
from hybrid_lightning.runner.fused_attention import FusedAttention, rotary, use_fused_attention
from hybrid_lightning.types import Sequences

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")


def attention_of(model):
    return next(module for name, module in model.named_modules() if name.endswith(("self_attn", "attn")))


def packed_pass(model, backend):
    ids = torch.arange(3, 17).view(2, 7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    packed = PackedSequences(Sequences(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:]), backend)
    with backend.in_pass():
        return own_hidden(model, packed.ids, packed.positions, packed)


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_layers_that_compute_what_llamas_do_are_fused(family):
    plain = special_model(SPECIAL[family]) if family in SPECIAL else build_model(family)
    use_packing(plain)
    model, backend = copy.deepcopy(plain), Backend()
    use_fused_attention(model, backend)
    layer, original = attention_of(model), attention_of(plain)
    assert isinstance(layer, type(original)) and isinstance(layer, FusedAttention) is (family not in ("gpt2", "olmo2", "phi3"))
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.randint(3, 30, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits), "a call outside of a pass gives transformers' own numbers"
        expected = packed_pass(plain, backend)
        assert_same_sums(packed_pass(model, backend), expected, additions_of(model, 7))


def test_ours_computes_in_passes_alone_and_a_layer_that_somebody_watches_stays_as_it_is(monkeypatch):
    calls = []
    monkeypatch.setattr(fused_attention, "rotary", lambda *parts: calls.append(1) or rotary(*parts))
    model, backend = build_model("llama"), Backend()
    use_packing(model)
    use_fused_attention(model, backend)
    calls.clear()  # of the trial
    model(torch.arange(3, 9)[None])
    assert not calls
    packed_pass(model, backend)
    assert len(calls) == 2, "once a layer"
    model = build_model("llama")
    attention_of(model).register_forward_hook(lambda *_: None)
    use_fused_attention(model, Backend())
    first, second = (layer.self_attn for layer in model.model.layers)
    assert not isinstance(first, FusedAttention) and isinstance(second, FusedAttention)


@pytest.mark.parametrize("change", ["numbers", "scaling", "sliding_window"])
def test_a_layer_that_computes_or_asks_for_something_else_is_not_fused(change, monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", None)  # which no trial needs
    theirs = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **options):
        if change == "scaling":
            self.scaling = self.scaling * 2 if options["packing"] is not None else self.scaling
        elif change == "sliding_window":
            options["sliding_window"] = 2
        given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        output, weights = theirs(self, hidden_states, **given, **options)
        return output * (1 + 2**-20) if change == "numbers" else output, weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    model = build_model("llama")
    use_fused_attention(model, Backend())
    assert not isinstance(attention_of(model), FusedAttention)


def test_a_copy_computes_the_same():
    model = get_peft_model(build_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    runner = ModelRunner(model)
    use_packing(model.get_base_model())
    use_fused_attention(model, runner.backend)
    use_fused_attention(model, runner.backend)  # a fused layer stays as it is
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = attention_of(other)
        assert type(layer) is type(attention_of(model)) and layer.backend is not runner.backend
        assert torch.equal(packed_pass(other, layer.backend), packed_pass(model, runner.backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_equal_transformers(dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(5, heads, 8).to(dtype) for heads in (4, 2))
    cos, sin = torch.randn(2, 5, 8).to(dtype)
    outer = [torch.randn(part.shape).to(dtype) for part in (q, k)]
    found, backend = [], Backend()
    with backend.in_pass():
        for function in (fused_attention.plain_rotary, lambda *parts: rotary(backend, *parts)):
            leaves = [part.clone().requires_grad_() for part in (q, k)]
            rotated = function(*leaves, cos, sin)
            found.append([*rotated, *torch.autograd.grad(rotated, leaves, outer)])
    step = 2**-7 if dtype == torch.bfloat16 else 1e-6  # theirs rounds products and the sum
    for mine, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, expected, atol=4 * step, rtol=step)

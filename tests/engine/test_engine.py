"""An engine says which of its passes are fast, and why others are not: once in the log, and whenever it is asked."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import ALL, build
from tiny_models import VOCABULARY, build_model
from tiny_runs import fit, write_model, write_sums
from transformers import AutoModelForCausalLM, BloomConfig

from hybrid_lightning.engine import Backend, Engine, use_fused_modules
from hybrid_lightning.engine import attention_hook as hook
from hybrid_lightning.engine import backend as backends
from hybrid_lightning.engine import decoder as decoders
from hybrid_lightning.engine import engine as engines
from hybrid_lightning.engine.cpu import build as building
from hybrid_lightning.engine.cpu import operators
from hybrid_lightning.engine.cpu.build import library
from hybrid_lightning.policy.modes import checkpoint_gradients

needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels")
FAST = {"packed training", "shared prompts", "fused layers", "CPU kernels", "prepacked weights", "fast decoding"}


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch):
    """Whatever processor the tests run on."""
    monkeypatch.setattr(backends, "_has_onednn", lambda: True)


def slow(engine):
    engine.prepare()
    passes = engine.passes()
    assert set(passes) == FAST
    return {name: reason for name, reason in passes.items() if reason}


@pytest.fixture
def said(monkeypatch):
    """What is said once a run; whether a log is caught depends on who has set up logging before."""
    lines = []
    monkeypatch.setattr(engines, "rank_zero_info", lines.append)
    return lines


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_all_passes_of_known_families_are_fast(family, said):
    engine = build(family)
    assert not slow(engine) and not said, "nobody wants to know it yet"
    for _ in range(2):
        engine.report()
        engine.prepare()
    assert said == ["engine: packed training, shared prompts, fused layers, CPU kernels, prepacked weights and fast decoding"]


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "library", building.library)
    monkeypatch.setenv("HYBRID_LIGHTNING_KERNELS", "1")
    monkeypatch.setenv("CXX", "none-such")
    building._found.cache_clear()
    try:
        engine = build("llama")
        reasons = slow(engine)
        assert list(reasons) == ["CPU kernels"] and "CXX=none-such is not there; install one" in reasons["CPU kernels"]
        assert "; torch's own operators, since CXX=none-such is not there" in engine.description()
        monkeypatch.setenv("HYBRID_LIGHTNING_KERNELS", "0")
        building._found.cache_clear()
        assert slow(engine) == {"CPU kernels": "HYBRID_LIGHTNING_KERNELS=0 is set"}
    finally:
        building._found.cache_clear()


@needs_kernels
def test_a_family_whose_layers_are_not_known():
    engine = build("gemma")
    assert slow(engine) == {"fast decoding": "GemmaDecoderLayer is not known"}
    assert engine.description().endswith("and prepacked weights; torch's own decoding, since GemmaDecoderLayer is not known")
    reasons = slow(build("gpt2", ("c_attn",)))
    assert set(reasons) == {"fused layers", "prepacked weights", "fast decoding"}
    assert reasons["fused layers"] == "no layer of GPT2LMHeadModel computes what Llama's do"


@needs_kernels
def test_a_family_whose_attention_cannot_be_packed(said):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=["dense_h_to_4h"]))
    engine = Engine(model.eval())
    use_fused_modules(model, engine.backend)
    engine.report()
    reasons = slow(engine)
    assert reasons["packed training"] == reasons["shared prompts"] == reasons["fast decoding"]
    assert "BloomForCausalLM does not use transformers' attention interface" in reasons["packed training"]
    assert "padded training, prompts repeated for each completion and torch's own decoding, since Bloom" in said[0]


@needs_kernels
def test_a_packing_trial_that_fails(monkeypatch):
    separate = hook.separate_logits
    monkeypatch.setattr(hook, "separate_logits", lambda *parts: 2 * separate(*parts))
    reasons = slow(build("llama"))
    assert set(reasons) == {"packed training", "shared prompts", "fast decoding"}
    assert len(set(reasons.values())) == 1 and "packed sequences change its logits" in reasons["fast decoding"]


@needs_kernels
def test_float16_of_the_model_or_by_autocast_is_what_counts():
    model = build("llama").model.half()
    reasons = slow(Engine(model))
    assert set(reasons) == {"CPU kernels", "prepacked weights"}
    assert "and the model with float16" in reasons["CPU kernels"]
    engine = build("llama")
    with torch.autocast("cpu", torch.float16):
        engine.prepare()
    assert "float16" in engine.passes()["CPU kernels"]


@needs_kernels
def test_modules_that_are_watched_or_wrapped():
    engine = build("llama")
    layer = engine.model.get_base_model().model.layers[1]
    handle = layer.register_forward_hook(lambda *_: None)
    assert "hooks watch the calls of LlamaDecoderLayer" in slow(engine)["fast decoding"]
    handle.remove()
    assert not slow(engine)
    layers = engine.model.get_base_model().model.layers
    layers[1] = type("FSDPLlamaDecoderLayer", (type(layer),), {"__init__": lambda self: torch.nn.Module.__init__(self)})()
    assert "FSDPLlamaDecoderLayer is not known, as where a strategy has wrapped it" in slow(engine)["fast decoding"]


@needs_kernels
@pytest.mark.parametrize(("settings", "prepacked"), [({"lora_dropout": 0.5}, True), ({"use_dora": True}, False)])
def test_prepacked_weights_are_for_plain_lora_in_eval_mode(settings, prepacked):
    engine = build("llama", ALL, **settings)
    engine.model.train()
    assert ("prepacked weights" not in slow(engine)) is prepacked
    assert prepacked or "such as DoRA" in slow(engine)["prepacked weights"]


def test_an_accelerator_has_no_kernels_and_no_copies_as_a_processor_without_onednn(monkeypatch):
    backend, cuda = Backend(), torch.device("cuda")
    assert backend.why_no_operators(cuda, torch.float32) == "they are for CPUs, and the model is on cuda"
    assert backend.why_no_copies(cuda, torch.float32) == "copies of weights do not pay on cuda"
    monkeypatch.setattr(backends, "_has_onednn", lambda: False)
    assert "no AVX-512" in slow(build("llama"))["prepacked weights"]


@needs_kernels
def test_a_model_without_an_adapter_says_so():
    engine = Engine(build_model("llama"))
    engine.prepare()
    assert engine.description().startswith("engine of the model without an adapter: packed training, shared prompts and CPU")
    assert "the model has no adapter, with which its layers are fused" in engine.description()


def test_a_run_says_it_and_a_resumed_one_what_has_changed(tmp_path, said, monkeypatch):
    model, sums = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl")
    fit(model, sums, tmp_path / "runs", max_steps=2).trainer.save_checkpoint(tmp_path / "last.ckpt")
    (line,) = said
    assert line.startswith("engine: packed training, shared prompts, fused layers"), "of the adapted model, and not while scored"
    fit(model, sums, tmp_path / "again", ckpt=tmp_path / "last.ckpt", max_steps=4)  # a warning of ours would be an error
    monkeypatch.setattr(decoders, "why_layers_differ", lambda *_: "other numbers")
    message = "continued had fast decoding; this one has torch's own decoding, since calling its parts"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(model, sums, tmp_path / "other", ckpt=tmp_path / "last.ckpt", max_steps=4)
    assert sum("had fast decoding" in str(each.message) for each in warned) == 1


def test_an_engine_knows_nothing_before_it_is_prepared_and_a_copy_of_one_is_one_of_its_own():
    engine = build("llama")
    with pytest.raises(AssertionError, match="prepared first"):
        engine.passes()
    engine.prepare()
    checkpoint_gradients(engine.model.get_base_model(), engine.backend)
    other = copy.deepcopy(engine)
    assert other.packs and other.model is not engine.model and other.backend is not engine.backend

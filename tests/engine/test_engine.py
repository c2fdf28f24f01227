"""An engine says which of its passes are fast, and why others are not: once in the log, and whenever it is asked."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import build, fused
from tiny_models import VOCABULARY, build_model
from tiny_runs import fit, write_model, write_sums
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hybrid_lightning.engine import Backend, Engine
from hybrid_lightning.engine import attention_hook as hook
from hybrid_lightning.engine import backend as backends
from hybrid_lightning.engine import decoder as decoders
from hybrid_lightning.engine import engine as engines
from hybrid_lightning.engine.cpu import build as building
from hybrid_lightning.engine.cpu import operators
from hybrid_lightning.engine.cpu.build import library
from hybrid_lightning.engine.fused_lora import made_like
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


def bloom():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    return fused(get_peft_model(model, LoraConfig(r=2, target_modules=["dense_h_to_4h"])).eval())


def in_train_mode(engine):
    engine.model.train()
    return engine


# Engines, and what they say of slow passes.
SLOW = {
    "layers": (lambda: build("gemma"), "and prepacked weights; torch's own decoding, since GemmaDecoderLayer is not known$"),
    "nothing": (
        lambda: build("gpt2", ("c_attn",)),
        "prompts and CPU kernels; transformers' own layers, since no layer of GPT2LMHeadModel computes what Llama's do; ",
    ),
    "attention": (
        bloom,
        "^engine: CPU kernels and prepacked weights; padded training, prompts repeated for each completion and torch's own "
        "decoding, since BloomForCausalLM does not use transformers' attention interface; transformers' own layers, since no ",
    ),
    "float16": (
        lambda: Engine(build("llama").model.half()),
        "torch's own operators, .* and the model with float16; weights as .*16$",
    ),
    "dropout": (
        lambda: in_train_mode(build("llama", lora_dropout=0.5)),
        "prepacked weights; torch's own decoding, .* train mode$",
    ),
    "DoRA": (lambda: build("llama", use_dora=True), "CPU kernels and fast decoding; weights as they are, .* such as DoRA"),
    "no adapter": (
        lambda: Engine(build_model("llama")),
        "^engine of the model without an adapter: packed training, shared prompts and CPU kernels; transformers' own layers, "
        "since the model has no adapter, with which its layers are fused; weights .* no layer has LoRA; .* is not fused$",
    ),
}


@needs_kernels
@pytest.mark.parametrize("case", SLOW)
def test_what_is_slow_and_why(case, said):
    make, words = SLOW[case]
    engine = make()
    engine.report()
    assert slow(engine) and said == [engine.description()] and re.search(words, said[0]), said


@needs_kernels
def test_a_packing_trial_that_fails(monkeypatch):
    separate = hook.separate_logits
    monkeypatch.setattr(hook, "separate_logits", lambda *parts: 2 * separate(*parts))
    reasons = slow(build("llama"))
    assert set(reasons) == {"packed training", "shared prompts", "fast decoding"}
    assert len(set(reasons.values())) == 1 and "packed sequences change its logits" in reasons["fast decoding"]


@needs_kernels
def test_autocast_is_what_counts():
    engine = build("llama")
    with torch.autocast("cpu", torch.float16):
        engine.prepare()
    assert "float16" in engine.passes()["CPU kernels"]


@needs_kernels
def test_layers_that_are_watched_or_wrapped():
    engine = build("llama")
    layers = engine.model.get_base_model().model.layers
    fused_mlp, layers[0].mlp = layers[0].mlp, made_like(layers[0].mlp, LlamaMLP)
    assert slow(engine)["fast decoding"] == "LlamaMLP is not fused"
    layers[0].mlp = fused_mlp
    layers[1].register_forward_hook(lambda *_: None)
    assert "hooks watch the calls of LlamaDecoderLayer" in slow(engine)["fast decoding"]
    layers[1] = type("FSDPLlamaDecoderLayer", (type(layers[1]),), {"__init__": lambda self: torch.nn.Module.__init__(self)})()
    assert "FSDPLlamaDecoderLayer is not known, as where a strategy has wrapped it" in slow(engine)["fast decoding"]


def test_an_accelerator_has_no_kernels_and_no_copies_as_a_processor_without_onednn(monkeypatch):
    backend, cuda = Backend(), torch.device("cuda")
    assert backend.why_no_operators(cuda, torch.float32) == "they are for CPUs, and the model is on cuda"
    assert backend.why_no_copies(cuda, torch.float32) == "copies of weights do not pay on cuda"
    monkeypatch.setattr(backends, "_has_onednn", lambda: False)
    assert "no AVX-512" in slow(build("llama"))["prepacked weights"]


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
    adapted, alone = engine.of(engine.model), engine.of(engine.model, is_copy=True)
    assert adapted.packs and adapted.graphs is engine.graphs and not alone.is_prepared
    other = copy.deepcopy(engine)
    assert other.packs and other.model is not engine.model and other.backend is not engine.backend

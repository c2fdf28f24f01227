"""A runner reports which of its passes are fast, and why others are not: once in the log, and on request."""

import re

import pytest
import torch
from tiny_decoders import build, has_pass
from tiny_models import build_model
from tiny_runs import fit
from transformers.models.llama.modeling_llama import LlamaMLP

from hybrid_lightning.runner import ModelRunner, model_runner
from hybrid_lightning.runner import backend as backends
from hybrid_lightning.runner import decoder as decoders
from hybrid_lightning.runner.cpu.build import library
from hybrid_lightning.runner.fused_lora import made_like

needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels")
FAST = {"packed training", "shared prompts", "fused layers", "CPU kernels", "prepacked weights", "fast decoding"}


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch):
    """Whatever processor the tests run on."""
    monkeypatch.setattr(backends, "_has_onednn", lambda: True)


def slow(runner):
    runner.prepare()
    passes = runner.passes()
    assert set(passes) - {"16-bit products"} == FAST
    return {name: reason for name, reason in passes.items() if reason}


@pytest.fixture
def said(monkeypatch):
    """The lines logged once a run; whether a log is caught depends on earlier logging set-up."""
    lines = []
    monkeypatch.setattr(model_runner, "rank_zero_info", lines.append)
    return lines


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_all_passes_of_known_families_are_fast(family, said):
    runner = build(family)
    assert not slow(runner) and not said, "nobody wants to know it yet"
    for _ in range(2):
        runner.report()
        runner.prepare()
    assert said == ["model runner: all fast paths on"]


# Model runners, and their reasons for slow passes.
SLOW = {
    "layers": (
        lambda: build("gemma"),
        "^model runner: fast decoding off: GemmaDecoderLayer is not known; all other fast paths on$",
    ),
    "nothing": (
        lambda: build("gpt2", ("c_attn",)),
        "^model runner: fused layers off: no layer of GPT2LMHeadModel .*\nmodel runner: .*fast decoding off: .*paths on$",
    ),
    "float16": (
        lambda: ModelRunner(build("llama").model.half()),
        "CPU kernels off: .* and the model with float16\nmodel runner: prepacked weights off: .*16; all other fast paths on$",
    ),
    "autocast": (
        lambda: build("llama"),
        "CPU kernels off: .* and the model with float16\nmodel runner: prepacked weights off: .*16; all other fast paths on$",
    ),
    "dropout": (
        lambda: ModelRunner(build("llama", lora_dropout=0.5).model.train()),
        "^model runner: fast decoding off: .* train mode; all other fast paths on$",
    ),
    "DoRA": (lambda: build("llama", use_dora=True), "^model runner: prepacked weights off: .* DoRA"),
    "no adapter": (
        lambda: ModelRunner(build_model("llama")),
        "^model runner: fused layers, prepacked weights and fast decoding off: the model has no adapter; all other .* on$",
    ),
}


@needs_kernels
@pytest.mark.parametrize("case", SLOW)
def test_what_is_slow_and_why(case, said):
    make, words = SLOW[case]
    runner = make()
    runner.report()
    with torch.autocast("cpu", torch.float16, enabled=case == "autocast"):
        assert slow(runner) and said == [runner.description()] and re.search(words, said[0]), said


@needs_kernels
def test_layers_that_are_watched_or_wrapped():
    runner = build("llama")
    decoder = runner.model.get_base_model().get_decoder()
    for name in ("", "layers.1", "layers.0.self_attn", "layers.1.mlp.gate_proj", "norm"):
        handle = decoder.get_submodule(name).register_forward_hook(lambda *_: None)
        assert "hooks watch the calls of " in slow(runner)["fast decoding"] and not has_pass(runner)
        handle.remove()
        assert not slow(runner) and has_pass(runner)
    fused_mlp, decoder.layers[0].mlp = decoder.layers[0].mlp, made_like(decoder.layers[0].mlp, LlamaMLP)
    assert slow(runner)["fast decoding"] == "LlamaMLP is not fused"
    decoder.layers[0].mlp = fused_mlp
    wrapped = type("FSDPLlamaDecoderLayer", (type(decoder.layers[1]),), {})
    decoder.layers[1] = made_like(decoder.layers[1], wrapped)
    assert "FSDPLlamaDecoderLayer is not known; a strategy may have wrapped it" in slow(runner)["fast decoding"]


def test_a_run_says_it_and_a_resumed_one_what_has_changed(model, sums, tmp_path, said, monkeypatch):
    fit(model, sums, tmp_path / "runs", max_steps=1).trainer.save_checkpoint(tmp_path / "last.ckpt")
    (line,) = said
    assert line == "model runner: all fast paths on", "of the adapted model, and not while scored"
    monkeypatch.setattr(decoders, "why_layers_differ", lambda *_: "other numbers")
    message = r"the runner differs from the run that this one continues \(fast decoding off: calling its parts"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(model, sums, tmp_path / "other", ckpt=tmp_path / "last.ckpt", max_steps=2)
    assert sum("the runner differs" in str(each.message) for each in warned) == 1

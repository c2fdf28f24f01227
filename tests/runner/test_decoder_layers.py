"""What accelerators get compiled, compiled here for a CPU: the same rollouts, one compilation for all sizes, and ways back."""

import inspect
import re
from unittest.mock import Mock

import pytest
import torch
from rounding import LOGITS, additions_of, assert_same_sums
from tiny_decoders import ALL, SOME, build, has_pass, sampled
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.runtime.cache_dir_utils import cache_dir

from hybrid_lightning.runner import compiling
from hybrid_lightning.runner import decoder as decoders
from hybrid_lightning.runner import decoder_layers as layers
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.cpu.build import library
from hybrid_lightning.runner.passes import base_model
from hybrid_lightning.runner.prepacked import product_factors

# In torch 2.8 and 2.10 its compiler has a TypeError for CPUs where it shall round 16 bits in between.
ROUNDS = "use_compute_types" in inspect.signature(CppVecOverrides.to_dtype).parameters
needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler: torch compiles nothing for a CPU")


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Weights are multiplied where they are, and layers compiled, though this is a CPU."""
    monkeypatch.setattr(Backend, "copies_pay", lambda *_: False)
    monkeypatch.setattr(decoders, "why_not_compiled", lambda device: "")
    # torch finds graphs again by all but the processor's vectors: one of 256 bits, as with ATEN_CPU_CAPABILITY=avx2, writes
    # beyond its tensors where they have 512.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache_dir()}_{torch.backends.cpu.get_cpu_capability()}")
    monkeypatch.setattr(compiling, "CODES", {})


def rollouts(runner, tokenizer, dtype):
    """Tokens and log-probabilities, and how many functions were compiled for them."""
    before = len(compiling.CODES)
    half = {"dtype": torch.bfloat16, "enabled": dtype is not None}
    with torch.no_grad(), torch.autocast("cpu", **half), runner.sampling(dtype):
        tokens, logprobs = sampled(runner, tokenizer, passes := [])
    assert len(passes) > 5 and all(passes)
    return tokens, logprobs, len(compiling.CODES) - before


def assert_same_rollouts(runner, found, expected):
    assert torch.equal(found[0], expected[0])
    assert_same_sums(found[1], expected[1], additions_of(runner.model, 22), LOGITS)


@needs_compiler
@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize(
    ("family", "targets", "dtype", "settings"),
    [
        ("qwen3", ALL, torch.bfloat16, {}),
        ("mistral", SOME, None, {"layers_to_transform": [1], "rank_pattern": {"k_proj": 1, "up_proj": 5}}),
    ],
)
def test_rollouts_are_the_same(family, targets, dtype, settings, tokenizer, monkeypatch):
    dtype = dtype if ROUNDS else None
    runner = build(family, targets, **settings)
    *found, graphs = rollouts(runner, tokenizer, dtype)
    assert graphs == 2, "before and after attention, for any number of rows"
    with torch.inference_mode():
        *again, more = rollouts(runner, tokenizer, dtype)
    assert all(map(torch.equal, again, found)) and more == 0 and runner._fast.compiles, "as where a policy is validated"
    if family == "mistral":
        code = "".join(code.made.source_code for code in compiling.CODES.values())
        assert code.count("extern_kernels.") == 13, "products; the output projection has no LoRA and so no products for it"
        assert len(re.findall(r"^ +cpp_fused", code, re.MULTILINE)) == 6, "kernels between them, as they are counted"
    monkeypatch.setattr(decoders, "why_not_compiled", lambda device: "switched off")
    plain = build(family, targets, **settings)
    *expected, none = rollouts(plain, tokenizer, dtype)
    assert plain._fast.calls_parts and not plain._fast.compiles and none == 0
    assert_same_rollouts(runner, found, expected)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_where_compiling_fails_or_gives_other_numbers_it_is_said_and_plain_calls_are_made(monkeypatch, caplog, request):
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_compile", Mock(side_effect=RuntimeError("no working compiler found")))
        runner = build("llama")
        assert has_pass(runner) and not runner._fast.compiles
    assert runner._fast.why_not_compiled == "torch.compile gave RuntimeError: no working compiler found"
    assert "RuntimeError: no working compiler found" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text
    request.getfixturevalue("traced")
    original = layers.CompiledLayer.output
    monkeypatch.setattr(layers.CompiledLayer, "output", lambda *parts: original(*parts) * 1.001)
    runner = build("llama")
    assert has_pass(runner) and "other numbers" in runner._fast.why_not_compiled and not runner._fast.compiles


@pytest.mark.usefixtures("as_on_an_accelerator", "traced")
def test_a_compiler_that_fails_in_the_middle_of_a_rollout_does_not_end_it(monkeypatch, caplog, tokenizer):
    runner, original, calls = build("llama"), layers._Body.__call__, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 11:  # the third pass, before the attention of its second layer
            raise compiling.CompilingError("OSError: no space left")
        return original(*arguments)

    with torch.no_grad():
        with runner.sampling():
            expected = sampled(runner, tokenizer, [])
        assert runner._fast.compiles
        monkeypatch.setattr(layers._Body, "__call__", fails)
        with runner.sampling():
            found = sampled(runner, tokenizer, [])
    assert_same_rollouts(runner, found, expected)
    assert len(calls) == 11 and caplog.text.count("OSError: no space left") == 1
    assert not runner._fast.compiles, "from then on"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_disabled_adapter_is_left_out(compiled, request, tokenizer):
    for fixture in ("as_on_an_accelerator", "traced") if compiled else ():
        request.getfixturevalue(fixture)
    runner = build("llama", SOME)
    with runner.model.disable_adapter():
        expected = sampled(runner, tokenizer, [])
    with torch.no_grad(), runner.sampling():
        assert not torch.equal(sampled(runner, tokenizer, [])[1], expected[1])
        with runner.model.disable_adapter():
            found = sampled(runner, tokenizer, [])
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_layers_that_are_no_plain_products_or_that_somebody_watches_are_called(tokenizer, traced):
    runner = build("llama", use_dora=True)
    with torch.no_grad():
        expected = sampled(runner, tokenizer, [])
        with runner.sampling():
            found = sampled(runner, tokenizer, [])
    assert_same_rollouts(runner, found, expected)
    assert not traced
    runner, calls = build("llama", SOME), []
    copy = base_model(runner.model).get_decoder().layers[0].self_attn.v_proj.modules_to_save["default"]
    copy.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), runner.sampling():
        calls.clear()
        sampled(runner, tokenizer, passes := [])
    assert len(calls) == len(passes) > 0, "a fully trained copy"


@pytest.mark.usefixtures("as_on_an_accelerator", "traced")
def test_a_fully_trained_weight_is_rounded_once_and_not_at_every_token():
    runner = build("llama", SOME)
    wrapper = base_model(runner.model).get_decoder().layers[0].self_attn.v_proj
    own = wrapper.modules_to_save["default"]
    with torch.autocast("cpu", torch.bfloat16), runner.sampling(torch.bfloat16):
        weight = product_factors(wrapper).weight
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad and torch.equal(weight, own.weight.bfloat16())
        assert torch.equal(product_factors(wrapper).weight, weight) and wrapper.modules_to_save["default"] is not own
    assert wrapper.modules_to_save["default"] is own and own.weight.dtype == torch.float32 and own.weight.requires_grad
    with runner.sampling():
        assert product_factors(wrapper).weight.data_ptr() == own.weight.data_ptr(), "not where it is multiplied as it is"


def test_it_is_for_devices_that_torch_writes_triton_kernels_for(monkeypatch):
    devices = [torch.device(name) for name in ("cuda:1", "xpu", "cpu", "mps")]
    assert [not compiling.why_not_compiled(device) for device in devices] == [True, True, False, False]
    with torch._dynamo.config.patch(disable=True):  # as TORCH_COMPILE_DISABLE=1 does
        assert all(map(compiling.why_not_compiled, devices))
    for capability, halves in (((7, 5), {torch.bfloat16}), ((8, 0), set())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = {half for half in (torch.bfloat16, torch.float16) if compiling.why_not_compiled(torch.device("cuda"), half)}
        assert found == halves, "Triton leaves functions in bfloat16 uncompiled there"

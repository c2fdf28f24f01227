"""What is compiled for accelerators: the same numbers for all sizes, a way back, and no compiler on a CPU."""

import logging
from unittest.mock import Mock

import pytest
import torch
from test_logprobs import build_sequences
from tiny_decoders import ALL, SOME, OfAccelerator
from tiny_decoders import build as build_adapted
from torch import Tensor

from hybrid_lightning.engine import Engine, base_model, compiling, fused_layers, segments, use_fused_modules
from hybrid_lightning.engine.cpu.build import library
from hybrid_lightning.engine.logprobs import token_logprobs
from hybrid_lightning.model.precision import checkpoint_gradients


@pytest.fixture
def made(monkeypatch):
    """Compile for the CPU, by what torch traces and without machine code; gives the names of what was compiled."""
    names = []

    def compiled(function):
        return torch.compile(function, backend=lambda graph, _: names.append(function.__name__) or graph.forward)

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "compiled", compiled)
    for part in (fused_layers, segments):
        for kernel in vars(part).values():
            if isinstance(kernel, compiling.OneKernel):
                monkeypatch.setattr(kernel, "_compiled", compiled(kernel.plain), raising=False)
    monkeypatch.setattr(compiling, "compiling_pays", lambda device: True)
    yield names
    torch._dynamo.reset()


def step(family, targets, checkpointing, half, case="shared"):
    """Log-probabilities of a step and its gradients, as on an accelerator."""
    model = build_adapted(family, targets).model
    engine = Engine(model, OfAccelerator())
    use_fused_modules(model, engine.backend)
    if checkpointing:
        checkpoint_gradients(base_model(model), engine.backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logprobs, _ = token_logprobs(engine, build_sequences(case), 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), trained)]


# In 16 bits compiled and uncompiled functions round in other places.
@pytest.mark.parametrize(
    ("family", "targets", "checkpointing", "half", "tolerance"),
    [("qwen3", ALL, False, False, 1e-5), ("llama", SOME, True, False, 1e-5), ("qwen2", ALL, True, True, 0.1)],
)
def test_a_step_has_the_same_numbers(made, family, targets, checkpointing, half, tolerance):
    settings = (family, targets, checkpointing, half)
    numbers = step(*settings) + step(*settings, "interrupted")
    assert set(made) >= {"norm", "_norm_gradient", "_product_of_silu", "_silu_gradients", "joined_results"}
    compiled = len(made)
    numbers += step(*settings)
    assert len(made) == compiled, "nothing more, once sizes have been seen to change"
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(compiling, "compiling_pays", lambda device: False)
        expected = step(*settings) + step(*settings, "interrupted") + step(*settings)
    for one, other in zip(numbers, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm()))


def test_nothing_is_compiled_on_a_cpu_and_a_compiler_that_fails_is_asked_once(monkeypatch, caplog):
    """And training goes on; memory that ran out is not taken for a compiler at fault."""

    def times(x: Tensor, factor: float) -> Tensor:
        return x * factor

    function = compiling.OneKernel(times, otherwise=lambda x, factor: x + x)
    fails = Mock(side_effect=[torch.OutOfMemoryError("full"), RuntimeError("no working compiler found")])
    monkeypatch.setattr(function, "_compiled", fails, raising=False)
    assert function(torch.ones(3), 2.0).tolist() == [2.0] * 3 and not fails.called
    monkeypatch.setattr(compiling, "compiling_pays", lambda device: True)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(3), 2.0)
    with caplog.at_level(logging.WARNING):
        results = [function(torch.ones(3), 2.0).tolist() for _ in range(3)]
    assert results == [[2.0] * 3] * 3 and fails.call_count == 2
    assert "RuntimeError: no working compiler found" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text


def test_it_is_for_devices_that_torch_writes_triton_kernels_for(monkeypatch):
    devices = [torch.device(name) for name in ("cuda:1", "xpu", "cpu", "mps")]
    assert [compiling.compiling_pays(device) for device in devices] == [True, True, False, False]
    with torch._dynamo.config.patch(disable=True):  # as TORCH_COMPILE_DISABLE=1 does
        assert not any(compiling.compiling_pays(device) for device in devices)
    for capability, halves in (((7, 5), {torch.bfloat16}), ((8, 0), set())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = {half for half in (torch.bfloat16, torch.float16) if compiling.why_not_compiled(torch.device("cuda"), half)}
        assert found == halves, "Triton leaves functions in bfloat16 uncompiled there"


@pytest.mark.skipif(library() is None, reason="no C++ compiler: torch compiles nothing for a CPU")
def test_torchs_own_compiler_takes_our_options():
    assert torch.equal(compiling.compiled(torch.sin)(torch.ones(3)), torch.sin(torch.ones(3)))

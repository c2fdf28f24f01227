"""Small functions of training that are compiled for accelerators: the same numbers, a way back, and no compiler on a CPU."""

import logging

import pytest
import torch
from test_logprobs import build_sequences
from tiny_decoders import OfAccelerator
from tiny_decoders import build as build_adapted

from hybrid_lightning.engine import Engine, compiling, use_fused_modules
from hybrid_lightning.engine.logprobs import token_logprobs


@pytest.fixture
def compiled(monkeypatch):
    """Compile for the CPU, by what torch traces and without machine code; gives the names of what was compiled."""
    names = []

    def traced(function):
        names.append(function.__name__)
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    compiling.compiled.cache_clear()
    monkeypatch.setattr(compiling, "compiling_pays", lambda device: True)
    monkeypatch.setattr(compiling, "compiled", compiling.cache(traced))
    return names


def step(family="qwen3"):
    """Log-probabilities of a step and its gradients, as on an accelerator."""
    model = build_adapted(family).model
    engine = Engine(model, OfAccelerator())
    use_fused_modules(model, engine.backend)
    logprobs, _ = token_logprobs(engine, build_sequences("shared"), 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logprobs, *torch.autograd.grad(logprobs.sum(), trained)]


def test_forward_and_backward_passes_are_compiled_and_give_the_same(compiled):
    numbers = step()
    passes = {"plain_norm", "_plain_norm_gradient", "_plain_silu_gradients", "_plain_product_of_silu", "rotated_halves"}
    assert set(compiled) == {*passes, "_plain_joined"} and len(compiled) == len(set(compiled)), "each once"
    compiled.clear()
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(compiling, "compiling_pays", lambda device: False)
        expected = step()
    assert not compiled
    for one, other in zip(numbers, expected, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(1.0, float(other.norm()))


def test_a_compiler_that_fails_is_asked_once_and_training_goes_on(compiled, monkeypatch, caplog):
    calls = []

    def fails(function):
        calls.append(function)
        raise RuntimeError("no working compiler found")

    monkeypatch.setattr(compiling, "compiled", fails)

    def times(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    function = compiling.one_kernel(times, otherwise=lambda x, factor: x + x)
    with caplog.at_level(logging.WARNING):
        results = [function(torch.ones(3), 2.0).tolist() for _ in range(3)]
    assert results == [[2.0] * 3] * 3 and len(calls) == 1
    assert "RuntimeError: no working compiler found" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text


def negative(x: torch.Tensor) -> torch.Tensor:
    return -x


def negative_at_fault(x: torch.Tensor) -> torch.Tensor:
    return -x


def test_memory_that_ran_out_is_not_taken_for_a_compiler_at_fault(compiled, monkeypatch):
    def fails(function):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(compiling, "compiled", fails)
    with pytest.raises(torch.OutOfMemoryError):
        compiling.one_kernel(negative_at_fault)(torch.ones(3))


def test_nothing_is_compiled_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("nothing is to be compiled"))
    assert compiling.one_kernel(negative)(torch.ones(2)).tolist() == [-1.0, -1.0]

"""What is compiled for accelerators: the same numbers for all sizes by the same code, ways back, and no compiler on a CPU."""

import logging
import re
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from test_logprobs import build_sequences
from tiny_decoders import ALL, SOME, OfAccelerator
from tiny_decoders import build as build_adapted
from torch import Tensor

from hybrid_lightning.model.precision import checkpoint_gradients
from hybrid_lightning.runner import ModelRunner, base_model, compiling, fused_layers, use_fused_modules
from hybrid_lightning.runner.logprobs import token_logprobs


@pytest.fixture
def made(traced, monkeypatch):
    """Compile for the CPU, by what torch traces and without machine code; gives the names of what was compiled."""
    monkeypatch.setattr(compiling, "why_not_compiled", lambda device: "")
    return traced


def step(family, targets, checkpointing, half, case="shared"):
    """Log-probabilities of a step and its gradients, as on an accelerator."""
    model = build_adapted(family, targets).model
    runner = ModelRunner(model, OfAccelerator())
    use_fused_modules(model, runner.backend)
    if checkpointing:
        checkpoint_gradients(base_model(model), runner.backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logprobs, _ = token_logprobs(runner, build_sequences(case), 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), trained)]


# In 16 bits compiled and uncompiled layers round in other places.
@pytest.mark.parametrize(
    ("family", "targets", "checkpointing", "half", "tolerance"),
    [("qwen3", ALL, False, False, 1e-5), ("llama", SOME, True, False, 1e-5), ("qwen2", ALL, True, True, 0.1)],
)
def test_a_step_has_the_same_numbers_and_each_part_is_compiled_once(made, family, targets, checkpointing, half, tolerance):
    settings = (family, targets, checkpointing, half)
    numbers = step(*settings)
    assert set(made) >= {"norm", "_norm_gradient", "_product_of_silu", "_silu_gradients", "joined_results"}
    norms = {"norm": 2, "_norm_gradient": 2} if family == "qwen3" else {}  # of layers and of heads
    assert Counter(made) == {**dict.fromkeys(made, 1), **norms} or half, "under autocast also for the float32 of the trial"
    compiled = len(made)
    numbers += step(*settings, "interrupted")
    assert len(made) == compiled, "for rows of any number"
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(compiling, "why_not_compiled", lambda device: "switched off")
        expected = step(*settings) + step(*settings, "interrupted")
    for one, other in zip(numbers, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm()))


def test_code_is_made_once_for_all_sizes_and_kept_from_those_that_it_does_not_fit(made, monkeypatch):
    """For numbers of rows, and not of what a norm adds up, which has a kernel of its own. One row is computed as it is, and so is
    what a guard of torch's compiler rules out; the screen says what was made.
    """
    said = []
    monkeypatch.setattr(compiling, "rank_zero_info", said.append)
    for rows, size in ((8, 16), (3, 16), (300, 48), (1, 16)):
        x, weight = torch.randn(rows, size), torch.randn(size)
        results = (kind(x, weight, 1e-6) for kind in (fused_layers.norm, fused_layers.norm.plain))
        assert all(torch.allclose(found, expected, atol=1e-6) for found, expected in zip(*results, strict=True))
    assert made == ["norm"] * 2 and len(said) == 2 and re.fullmatch(r"torch compiled norm for cpu in \d+\.\d s", said[0])
    code = compiling.compiled(_branch, (torch.ones(4),), [{0: "rows"}])
    assert code.fits(600) and not code.fits(400) and not code.fits(1), "it was traced for 509"
    assert compiling.compiled(_branch, (torch.ones(9),), [{0: "rows"}]) is code
    assert compiling.compiled(_branch, (torch.ones(9).double(),), [{0: "rows"}]) is not code


def _branch(x):
    return x + 1 if x.shape[0] > 500 else x - 1


def test_nothing_is_compiled_on_a_cpu_and_a_compiler_that_fails_is_asked_once(monkeypatch, caplog):
    """Training continues; an out-of-memory error is not blamed on the compiler."""

    def times(x: Tensor, factor: float) -> Tensor:
        return x * factor

    function = compiling.OneKernel("rows", times)
    fails = Mock(side_effect=[torch.OutOfMemoryError("full"), RuntimeError("no working compiler found")])
    monkeypatch.setattr(compiling, "_compile", fails)
    assert function(torch.ones(3), 2.0).tolist() == [2.0] * 3 and not fails.called
    monkeypatch.setattr(compiling, "why_not_compiled", lambda device: "")
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(3), 2.0)
    with caplog.at_level(logging.WARNING):
        results = [function(torch.ones(3), 2.0).tolist() for _ in range(3)]
    assert results == [[2.0] * 3] * 3 and fails.call_count == 2
    assert "RuntimeError: no working compiler found" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text

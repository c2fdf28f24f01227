"""What is compiled of training for accelerators: the same numbers, a way back, and no compiler on a CPU."""

import copy
import logging
import pickle

import pytest
import torch
from test_logprobs import build_sequences
from tiny_decoders import ALL, SOME, OfAccelerator
from tiny_decoders import build as build_adapted

from hybrid_lightning.engine import Engine, base_model, compiling, decoder_layers, trained_layers, use_fused_modules
from hybrid_lightning.engine.logprobs import token_logprobs
from hybrid_lightning.policy.modes import checkpoint_gradients


@pytest.fixture
def compiled(monkeypatch):
    """Compile for the CPU, by what torch traces and without machine code; gives the names of what was compiled."""
    names = []

    def traced(function):
        names.append(function.__name__)
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    compiling.compiled.cache_clear()
    as_traced = compiling.cache(traced)
    monkeypatch.setattr(trained_layers, "_TRIALS", trained_layers._Trials())
    for module in (compiling, trained_layers):
        monkeypatch.setattr(module, "compiling_pays", lambda device: True)
    for module in (compiling, decoder_layers):
        monkeypatch.setattr(module, "compiled", as_traced)
    return names


def step(family="qwen3", targets=ALL, checkpointing=False, half=False, change=None):
    """Log-probabilities of a step and its gradients, as on an accelerator."""
    model = build_adapted(family, targets).model
    engine = Engine(model, OfAccelerator())
    use_fused_modules(model, engine.backend)
    if checkpointing:
        checkpoint_gradients(base_model(model), engine.backend)
    for layer in base_model(model).get_decoder().layers:
        if change is not None:
            change(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logprobs, _ = token_logprobs(engine, build_sequences("shared"), 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), trained)]


def uncompiled_step(*arguments):
    with pytest.MonkeyPatch.context() as plain:
        for module in (compiling, trained_layers):
            plain.setattr(module, "compiling_pays", lambda device: False)
        return step(*arguments)


def assert_same(numbers, expected, tolerance):
    for one, other in zip(numbers, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm()))


BODIES = {"before_attention", "after_attention"}
OUTSIDE = {"plain_norm", "_plain_norm_gradient", "_plain_joined"}  # of layers that are compiled as a whole


# In 16 bits compiled and uncompiled layers round in other places.
@pytest.mark.parametrize(
    ("family", "targets", "checkpointing", "half", "tolerance"),
    [
        ("qwen3", ALL, False, False, 1e-5),
        ("llama", SOME, True, False, 1e-5),  # one module is trained fully, and two are frozen
        ("qwen2", ALL, True, True, 0.1),
    ],
)
def test_bodies_of_layers_are_compiled_and_give_the_same(compiled, family, targets, checkpointing, half, tolerance):
    numbers = step(family, targets, checkpointing, half)
    assert not trained_layers.why_not_trained_compiled() and len(compiled) == len(set(compiled)), "each once"
    assert set(compiled) > BODIES and (set(compiled) - BODIES - OUTSIDE <= {"rotated_halves"}), "the latter to try packing"
    compiled.clear()
    assert_same(numbers, uncompiled_step(family, targets, checkpointing, half), tolerance)
    assert not compiled


def test_parts_of_layers_of_other_families_are_compiled(compiled):
    numbers = step("gemma")
    assert "rotated_halves" in compiled and not BODIES & set(compiled)
    assert_same(numbers, uncompiled_step("gemma"), 1e-5)


def test_a_layer_with_hooks_or_a_trained_norm_is_not_compiled_as_a_whole(compiled):
    seen = []
    numbers = step(change=lambda layer: layer.mlp.register_forward_hook(lambda *_: seen.append(1)))
    assert seen and not BODIES & set(compiled)
    assert_same(numbers, uncompiled_step(), 1e-5)
    numbers = step(change=lambda layer: layer.self_attn.k_norm.weight.requires_grad_(True))
    assert not BODIES & set(compiled) and len(numbers) == len(uncompiled_step()) + 2


def test_bodies_that_give_other_gradients_are_not_used(compiled, monkeypatch, caplog):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    def miscompiled(function, rows, layer):
        result = function(*rows, layer)
        return Wrong.apply(result) if function is trained_layers.after_attention else result

    monkeypatch.setattr(trained_layers, "call_compiled", miscompiled)
    with caplog.at_level(logging.WARNING):
        numbers = step()
    assert "other numbers, 0.01 of their size away" in trained_layers.why_not_trained_compiled()
    assert "layers are trained without torch.compile" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text
    assert_same(numbers, uncompiled_step(), 1e-5)


@pytest.mark.parametrize(
    ("failing", "checkpointing", "recomputed"),
    [(1, False, 0), (5, False, 0), (6, False, 0), (1, True, 0), (5, True, 2), (6, True, 3)],
)
def test_a_compiler_that_fails_for_bodies_ends_no_training(compiled, monkeypatch, caplog, failing, checkpointing, recomputed):
    """In the trial of a kind of layer, or in a call after it; what was compiled is recomputed compiled."""
    calls = []

    def fails(function, rows, layer):
        calls.append(1)
        if len(calls) == failing:
            raise torch._dynamo.exc.RecompileError("no space left")
        return function(*rows, layer)

    monkeypatch.setattr(trained_layers, "call_compiled", fails)
    numbers = step(checkpointing=checkpointing)
    assert len(calls) == failing + recomputed, "it is not asked again"
    assert "RecompileError: no space left" in caplog.text
    assert_same(numbers, uncompiled_step(), 1e-5)


def test_fused_layers_are_copied_and_pickled():
    layer = base_model(build_adapted("llama").model).get_decoder().layers[0]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer) and isinstance(copied, trained_layers.FusedDecoderLayer)
        assert all(map(torch.equal, copied.state_dict().values(), layer.state_dict().values()))


def test_nothing_is_compiled_on_a_cpu_and_a_compiler_that_fails_is_asked_once(request, monkeypatch, caplog):
    """And training goes on; memory that ran out is not taken for a compiler at fault."""
    calls, errors = [], [torch.OutOfMemoryError("full"), RuntimeError("no working compiler found")]

    def fails(function):
        calls.append(function)
        raise errors[len(calls) - 1]

    def times(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    function = compiling.one_kernel(times, otherwise=lambda x, factor: x + x)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("nothing is to be compiled"))
    assert function(torch.ones(3), 2.0).tolist() == [2.0] * 3
    request.getfixturevalue("compiled")
    monkeypatch.setattr(compiling, "compiled", fails)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(3), 2.0)
    with caplog.at_level(logging.WARNING):
        results = [function(torch.ones(3), 2.0).tolist() for _ in range(3)]
    assert results == [[2.0] * 3] * 3 and len(calls) == 2
    assert "RuntimeError: no working compiler found" in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text

"""Fused decoder layers: in an update torch compiles all of a layer but its attention, forward and backward, for accelerators.

A layer of a known family (`decoder_layers.py`) gets a class of ours before its own. While a pass of packed tokens runs, ours
computes the two functions that sampling has, compiled with their gradients: both round alike, and torch keeps for the backward
pass what it cannot make again without a product. The layer is still called as a module, so that FSDP gathers its weights and
gradient checkpointing computes it again. At all other times, or where a part of a layer is not known, its own forward pass runs.

Before a kind of layer is first computed in this way both functions are tried on a few tokens: they have to give the numbers that
they give uncompiled, and the same gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.compiling import compiling_pays, give_up_compiling, higher_precision, variants_allowed, why_not_alike
from hybrid_lightning.engine.decoder_layers import (
    LAYERS,
    UnknownLayerError,
    after_attention,
    before_attention,
    call_compiled,
    known_layer,
    parts_of,
)
from hybrid_lightning.engine.fused_attention import FusedAttention
from hybrid_lightning.engine.fused_layers import is_watched
from hybrid_lightning.engine.fused_lora import FusedLora, PutBefore, put_before, replace_modules, weight_of
from hybrid_lightning.engine.prepacked import ProductFactors

_TRIED_ROWS = 8


class FusedDecoderLayer(PutBefore):
    """Base class that is put before a decoder layer's own class."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """Hidden states [1, N, n] after the layer from those before it."""
        self.backend.layer_parts = ()
        result = None if args else self._compiled(hidden_states, **options)
        own: Any = super().forward
        return own(hidden_states, *args, **options) if result is None else result

    def _compiled(
        self,
        hidden_states: Tensor,
        packing: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        attention_calls: Any = None,
        **options: Any,
    ) -> Tensor | None:
        """The same by compiled functions; None where they cannot be had."""
        again = self.backend.recomputed_parts
        wanted = _TRIALS.wanted(hidden_states) if again is None else bool(again)
        factors = self._factors() if wanted and packing is not None and attention_calls is None else None
        attention: Any = self.self_attn
        if factors is None or position_embeddings is None or not isinstance(attention, FusedAttention):
            return None
        parts: list[bool] = []

        def call(function: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple) -> Any:
            result, compiled = (
                _TRIALS.call(function, rows, layer) if again is None else _called(again[len(parts)], function, rows, layer)
            )
            parts.append(compiled)
            return result

        hidden, angles = hidden_states[0], [part[0].contiguous() for part in position_embeddings]
        before, after = factors
        query, key, value = call(before_attention, (hidden, *angles), before)
        attended = attention.attended(query, key, value, attention_mask, packing=packing, **options)[0]
        result: Tensor = call(after_attention, (hidden, attended), after)
        self.backend.layer_parts = tuple(parts)
        return result[None]

    def _factors(self) -> tuple[NamedTuple, NamedTuple] | None:
        try:
            layer = known_layer(self, self.backend)
        except UnknownLayerError:
            return None
        if any(norm.weight.requires_grad for norm in (*layer.norms, *(layer.head_norms or ()))):
            return None
        return parts_of(layer, _factors_of)


def use_fused_decoder_layers(model: nn.Module, backend: Backend) -> None:
    """Let the model's decoder layers be fused where they are of a known family.

    Args:
        model: Changed in place; its other modules are fused already.
        backend: The model's backend.
    """
    replace_modules(
        model, lambda module: put_before(FusedDecoderLayer, type(module)) if type(module) in LAYERS else None, backend
    )


def why_not_trained_compiled() -> str:
    """Why updates go on without compiled layers, in words for the user; empty where nothing is known to be wrong."""
    return _TRIALS.why_not


def _factors_of(layer: nn.Module) -> ProductFactors | None:
    """The factors by which a linear layer is trained; None for all but plain ones, fully trained ones and plain LoRA."""
    if isinstance(layer, FusedLora):
        name = layer.plain_adapter()
        if name is None:
            return None
        lora_a, lora_b = (weight_of(part[name]) for part in (layer.lora_A, layer.lora_B))
        return ProductFactors(weight_of(layer.base_layer), layer.base_layer.bias, lora_a, lora_b, layer.scaling[name])  # type: ignore[arg-type]
    if isinstance(layer, ModulesToSaveWrapper):
        if layer.disable_adapters:
            return None
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if type(layer) is not nn.Linear or is_watched(layer):
        return None
    return ProductFactors(layer.weight, layer.bias)


def _called(compiled: bool, function: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple) -> tuple[Any, bool]:
    if not compiled:
        return function(*rows, layer), False
    with variants_allowed():
        return call_compiled(function, rows, layer), True


class _Trials:
    """Which functions were compiled for which kinds of layers, and gave the same numbers."""

    def __init__(self) -> None:
        self.why_not = ""  # in words for the user, once something went wrong
        self._passed: set[Any] = set()

    def wanted(self, hidden: Tensor) -> bool:
        """Whether compiled functions are to be tried for these hidden states, [1, N, n]."""
        plain = isinstance(hidden, FakeTensor) or hidden.shape[0] != 1 or hidden.shape[1] < 2
        return not plain and not self.why_not and compiling_pays(hidden.device)

    def call(self, function: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple) -> tuple[Any, bool]:
        """The function's result, and whether it was compiled; where that fails, which is said once, it is not."""
        if not self.why_not and self._is_new(function, rows, layer):
            try:
                self._try(function, rows, layer)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the compiler's many parts raise, from a missing one to a full disk
                self._give_up(error)
        try:
            return _called(not self.why_not, function, rows, layer)
        except torch._dynamo.exc.TorchDynamoException as error:  # others may be those by which torch ends a recomputation
            self._give_up(error)
        return _called(False, function, rows, layer)

    def _give_up(self, error: Exception) -> None:
        self.why_not = give_up_compiling("layers are trained", error)

    def _is_new(self, function: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple) -> bool:
        tensors = [(part.shape[1:], part.dtype, part.requires_grad) for part in rows]
        tensors += [(leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in tree_leaves(layer) if isinstance(leaf, Tensor)]
        device = rows[0].device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = (function, tuple(tensors), half, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if kind in self._passed:
            return False
        self._passed.add(kind)
        return True

    def _try(self, function: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple) -> None:
        """Raise an error if a few rows have other numbers or gradients, compiled."""
        few = tuple(part[:_TRIED_ROWS] for part in rows)
        higher = higher_precision(rows[0])
        # Gradient checkpointing counts what is kept in between, and must not see what this keeps.
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            found, ordinary = (_numbers(partial(_called, compiled, function), few, layer) for compiled in (True, False))
            exact = ordinary
            if higher is not None:
                with torch.autocast(rows[0].device.type, enabled=False):
                    exact = _numbers(partial(_called, False, function), few, layer, higher)
        for numbers in zip(found, ordinary, exact, strict=True):
            if difference := why_not_alike(*numbers):
                raise ArithmeticError(difference)


def _numbers(
    run: Callable[..., Any], rows: tuple[Tensor, ...], layer: NamedTuple, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results, and the gradients of all that has one, in a dtype; None for that which each tensor has."""
    own_rows, own_layer = tree_map_only(Tensor, partial(_alone, dtype=dtype), (rows, layer))
    results = [part for part in tree_leaves(run(own_rows, own_layer)) if isinstance(part, Tensor)]
    trained = [part for part in tree_leaves((own_rows, own_layer)) if isinstance(part, Tensor) and part.requires_grad]
    made = [part for part in results if part.requires_grad]
    if not made:
        return results
    gradients = torch.autograd.grad(made, trained, [part.detach() for part in made], allow_unused=True)
    return [part.detach() for part in results] + [part for part in gradients if part is not None]


def _alone(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The same numbers without a history, as a tensor of the same kind, for which nothing has to be compiled again."""
    numbers = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(numbers, requires_grad=tensor.requires_grad)
    return numbers.requires_grad_(tensor.requires_grad)


_TRIALS = _Trials()

"""Trials: whether a faster implementation of a decoder layer gives the same numbers as the layer in training, up to rounding.

In 16 bits no two implementations round alike, and how a rounding error grows over many layers is chance: on some tokens two
correct passes end 45% apart. So layers are tried one at a time, on a few tokens. The layer's own forward pass in a higher
precision is the reference, and the error may only be about as large as the error of that pass in the same precision.

LoRA starts at zero, which would hide a mistake in it. For the trial B is drawn at random, so that LoRA adds as much to the result
as the base weight.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.backend import HALF, Backend
from hybrid_lightning.runner.decoder_layers import KnownLayer, LayerParts, own_class, projections
from hybrid_lightning.runner.fused_layers import drawn
from hybrid_lightning.runner.fused_lora import FusedLora, made_like, weight_of
from hybrid_lightning.runner.prepacked import prepacked_weights

_TOKENS = 12
# An error may be this many times the error of the ordinary computation, since values round differently. Seen: 0.7 to 1.1 times.
_TIMES = 2
# Added to that for float32, where sums in another order differ and the ordinary computation may have no error at all.
_FLOOR = 1e-4


def why_layers_differ(
    decoder: Any,
    layers: list[KnownLayer],
    backend: Backend,
    dtype: torch.dtype | None,
    parts_of: Callable[[KnownLayer], LayerParts],
) -> str:
    """How an implementation of layers differs from their own forward pass; empty if it does not.

    Args:
        decoder: The decoder, in eval mode, with unsharded weights, outside `prepacked_weights`.
        layers: Its layers. The first of each kind is tried: the kinds of projections decide the code that runs.
        backend: The backend of its fused layers.
        dtype: Dtype of the products; None means each weight's own.
        parts_of: Makes the implementation to try, within `prepacked_weights`.
    """
    kinds = {tuple(_kind(module) for module in projections(layer)): number for number, layer in reversed(list(enumerate(layers)))}
    device = next(decoder.parameters()).device
    ids = torch.randint(decoder.config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        hidden = decoder.embed_tokens(ids)
        cosines, sines = (part[0] for part in decoder.rotary_emb(hidden[None], torch.arange(_TOKENS, device=device)[None]))
        angles = (cosines.contiguous(), sines.contiguous())
        for number in sorted(kinds.values()):
            known = layers[number]
            with _drawn_adapters(known):
                ordinary = exact = _own_result(decoder.layers[number], hidden, angles)
                if (higher := _higher_precision(hidden)) is not None:
                    with torch.autocast(device.type, enabled=False):
                        exact = _own_result(decoder.layers[number], hidden, angles, higher)
                with prepacked_weights(decoder.layers[number], backend, dtype, known.same_input()), backend.in_pass():
                    parts = parts_of(known)
                    attended = _OneSequence().attend(0, *parts.heads(hidden, angles), known.settings)
                    found = parts.output(hidden, attended.reshape(len(hidden), -1))
                if difference := why_not_alike(found, ordinary, exact):
                    return difference
    return ""


def _kind(module: nn.Module) -> tuple[Any, ...]:
    plain = isinstance(module, FusedLora) and module.plain_adapter() is not None
    return type(module), plain, next(module.parameters()).dtype


def _own_result(layer: nn.Module, hidden: Tensor, angles: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The output of a layer's own forward pass for hidden states [N, n], under the current autocast, in this precision."""
    rows, *angles = (part.to(dtype or hidden.dtype)[None] for part in (hidden, *angles))
    given = {"attention_mask": None, "position_embeddings": tuple(angles), "packing": _OneSequence()}
    return _copy(layer, dtype)(rows, **given)[0]


def _copy(module: nn.Module, dtype: torch.dtype | None) -> Any:
    """A copy of a module without hooks, in another precision (weights of a quantized layer stay); None shares its weights."""
    made = made_like(module, own_class(module))
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()  # FSDP's
    made._modules = {name: None if part is None else _copy(part, dtype) for name, part in module._modules.items()}
    if dtype is not None:
        made._parameters = {
            name: nn.Parameter(part.to(dtype), part.requires_grad) if part is not None and part.is_floating_point() else part
            for name, part in module._parameters.items()
        }
    return made


def _higher_precision(rows: Tensor) -> torch.dtype | None:
    """A precision that makes errors negligible beside the errors of computing with these rows under the current autocast.

    None where the computation is in float32 and rounds no further. On an accelerator float32 products may round further.
    """
    device = rows.device.type
    if rows.dtype in HALF or torch.is_autocast_enabled(device):
        return torch.float32
    return torch.float64 if device == "cuda" else None


def why_not_alike(found: Tensor, ordinary: Tensor, exact: Tensor) -> str:
    """How numbers differ that should be equal up to rounding; empty if they do not.

    Errors are relative to the typical size at each place of the last axis. Some models have a few places with numbers a thousand
    times as large as elsewhere, which would hide errors in all others.

    Args:
        found: The numbers to check, [..., n].
        ordinary: The ordinary computation in the same precision.
        exact: The ordinary computation in a higher precision.
    """
    if found.dtype != ordinary.dtype:
        return f"{found.dtype} instead of {ordinary.dtype}"
    off, allowed = _error(found, exact), _TIMES * _error(ordinary, exact) + _FLOOR
    return "" if off <= allowed else f"other numbers, off by {off:.2g} of their size where rounding explains {allowed:.2g}"


def _error(found: Tensor, exact: Tensor) -> float:
    wanted = exact.double() if exact.device.type != "mps" else exact
    size = wanted.pow(2).mean(dim=tuple(range(wanted.dim() - 1)) or None, keepdim=True).sqrt()
    return float(((found.to(wanted) - wanted) / size.clamp(min=1e-30)).pow(2).mean().sqrt())


@contextmanager
def _drawn_adapters(layer: KnownLayer) -> Iterator[None]:
    """Draw B of a layer's LoRA within this context, so that LoRA adds about as much to its products as the base weights."""
    own: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for seed, module in enumerate(projections(layer)):
            name = module.plain_adapter() if isinstance(module, FusedLora) else None
            if isinstance(module, FusedLora) and name is not None:
                base, lora_a, lora_b = (weight_of(part) for part in (module.base_layer, module.lora_A[name], module.lora_B[name]))
                size = _size(base) / (abs(module.scaling[name]) * _size(lora_a) * lora_b.shape[1] ** 0.5 or 1.0)
                own.append((module.lora_B[name], module.lora_B[name]._parameters["weight"]))  # type: ignore[arg-type]
                other = (size * drawn(seed, *lora_b.shape)).to(lora_b)
                module.lora_B[name]._parameters["weight"] = nn.Parameter(other, requires_grad=False)
        yield
    finally:
        for part, weight in own:
            part._parameters["weight"] = weight


def _size(weight: Tensor) -> float:
    return float(weight.detach().float().pow(2).mean().sqrt())


class _OneSequence:
    """A `Packing` of one sequence, in any precision."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Causal attention over all tokens."""
        query, key, value = (part.to(value.dtype).transpose(0, 1)[None] for part in (query, key, value))
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=settings.scaling, enable_gqa=True)
        return result[0].transpose(0, 1)

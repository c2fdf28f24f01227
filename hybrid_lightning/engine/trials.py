"""Trials: whether a faster implementation of a decoder layer gives the same numbers as transformers' own class, up to rounding.

In 16 bits no two implementations round alike, and how a rounding error grows over many layers is chance: on some tokens two
correct passes end 45% apart. So layers are tried one at a time, on a few tokens. Transformers' layer in a higher precision is the
reference, and the error may only be about as large as the error of transformers' layer in the same precision.

LoRA starts at zero, which would hide a mistake in it. For the trial B is drawn at random, so that LoRA adds as much to the result
as the base weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from hybrid_lightning.engine.attention import AttentionSettings
from hybrid_lightning.engine.backend import HALF, Backend
from hybrid_lightning.engine.decoder_layers import KnownLayer, LayerParts, own_class, projections
from hybrid_lightning.engine.fused_layers import drawn
from hybrid_lightning.engine.fused_lora import FusedLora, weight_of
from hybrid_lightning.engine.prepacked import prepacked_weights

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
    """How an implementation of layers differs from transformers' own numbers; empty if it does not.

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
                ordinary = exact = _own_result(_own_layer(decoder, number, known), hidden, angles, hidden.dtype)
                if (higher := _higher_precision(hidden)) is not None:
                    with torch.autocast(device.type, enabled=False):
                        exact = _own_result(_own_layer(decoder, number, known, higher), hidden, angles, higher)
                with prepacked_weights(decoder.layers[number], backend, dtype, known.same_input()), backend.in_pass():
                    parts = parts_of(known)
                    attended = _OneSequence().attend(0, *parts.heads(hidden, angles), known.settings)
                    found = parts.output(hidden.clone(), attended.reshape(len(hidden), -1))
                if difference := why_not_alike(found, ordinary, exact):
                    return difference
    return ""


def _kind(module: nn.Module) -> tuple[Any, ...]:
    plain = isinstance(module, FusedLora) and module.plain_adapter() is not None
    return type(module), plain, next(module.parameters()).dtype


def _own_result(layer: nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The output of a layer of transformers' own class for hidden states [N, n], under the current autocast."""
    cosines, sines = (part.to(dtype)[None] for part in angles)
    given = {"attention_mask": None, "position_embeddings": (cosines, sines), "packing": _OneSequence()}
    return layer(hidden.to(dtype)[None], **given)[0]


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


def _own_layer(decoder: Any, number: int, known: KnownLayer, dtype: torch.dtype | None = None) -> nn.Module:
    """A layer of transformers' own class with the same weights and LoRA merged; `dtype=None` keeps each weight's dtype."""
    kind: Any = own_class(decoder.layers[number])
    with torch.device("meta"):
        layer = kind(decoder.config, number).eval()
    attention = layer.self_attn
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name, module in zip(names, projections(known), strict=True):
        setattr(attention if hasattr(attention, name) else layer.mlp, name, _merged(module, dtype))
    norms = [(layer.input_layernorm, known.norms[0]), (layer.post_attention_layernorm, known.norms[1])]
    if known.head_norms is not None:
        norms += [(attention.q_norm, known.head_norms[0]), (attention.k_norm, known.head_norms[1])]
    for empty, norm in norms:
        empty.weight = _frozen(norm.weight, dtype)
    return layer


def _merged(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    name = module.plain_adapter() if isinstance(module, FusedLora) else None
    if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
        module = module.modules_to_save[module.active_adapters[0]]
    base: Any = module.base_layer if isinstance(module, FusedLora) and name is not None else module
    if type(base) is not nn.Linear:
        return _AsItIs(module)
    weight = base.weight.detach()
    if isinstance(module, FusedLora) and name is not None:
        weight = weight.float() + module.get_delta_weight(name).detach().float()
    merged = nn.utils.skip_init(nn.Linear, 1, 1, device="cpu")
    merged.weight = _frozen(weight, dtype or base.weight.dtype)
    merged.bias = None if base.bias is None else _frozen(base.bias, dtype)  # type: ignore[assignment]
    return merged


def _frozen(weight: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype or weight.dtype), requires_grad=False)


class _AsItIs(nn.Module):
    """A projection that is not a plain layer, for example a quantized one. It is called in its own precision."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.call = (layer,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        layer = self.call[0]
        half = next((part.dtype for part in layer.parameters() if part.dtype in (torch.bfloat16, torch.float16)), x.dtype)
        return layer(x.to(half)).to(x.dtype)

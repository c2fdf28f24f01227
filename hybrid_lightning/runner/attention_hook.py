"""Routes a Hugging Face model's attention through a `Packing`, and checks that the numbers stay the model's own.

The sequences of a batch go through the model as one packed sequence without padding: everything in a decoder except attention
treats each token by itself. The model's attention layers call the function that is registered here with transformers' attention
interface. It passes queries, keys and values to the packing of the call. A call without a packing goes to the model's original
implementation.

Attention that a packing does not compute (sinks, biases, recurrent layers, chunks) would silently give other numbers. So each
model is tried once: its layers' requests to attention are checked, then a few tokens are computed both ways. A model that fails
keeps its own attention.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid_lightning.runner.activations import RECURRENT
from hybrid_lightning.runner.attention import AttentionCalls, AttentionSettings, Packing, UnsupportedAttentionError
from hybrid_lightning.runner.backend import HALF, Backend
from hybrid_lightning.runner.packing import PackedSequences
from hybrid_lightning.runner.padded import packed_rows_hidden, padded_hidden
from hybrid_lightning.runner.passes import base_model, own_hidden, project, separate_logits
from hybrid_lightning.types import Sequences

logger = logging.getLogger(__name__)

_PREFIX = "packed_"
# Tensors that layers pass to attention without influence on it; the packing already knows the last three.
_HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_CARRYING = {*RECURRENT, "conv"}  # layers that carry a state from token to token
# Relative to the spread of the logits. Wrong attention changes them by tenths at least.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


def use_packing(model: PreTrainedModel) -> None:
    """Make the model's layers attend by packings.

    Raises:
        UnsupportedAttentionError: If the model does not call transformers' attention interface.
    """
    original = str(model.config._attn_implementation)
    if original.startswith(_PREFIX):
        return
    name = register_packed(original)
    if not model._supports_attention_backend:
        raise UnsupportedAttentionError(f"{type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedAttentionError(f"{type(model).__name__} does not let its attention be set")


def register_packed(original: str) -> str:
    """Register an implementation that attends by packings, or by `original` in calls without one; returns its name."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packing is None:
            # "eager" is not registered: each model file has its own.
            eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            return function(module, query, key, value, attention_mask, **options)
        calls = options.pop("attention_calls", None)
        settings = _settings(options)
        if calls is not None:
            calls.settings.append(settings)
            calls.by_segments.append(settings.fits_segments(query, key, value))
        # transformers: [1, heads, N, D] in, [1, N, heads, D] out
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        return packing.attend(module.layer_idx, query, key, value, settings)[None], None  # type: ignore[arg-type]

    name = _PREFIX + original
    AttentionInterface.register(name, attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _settings(options: dict[str, Any]) -> AttentionSettings:
    window = options.pop("sliding_window", None)
    known = {name: options.pop(name) for name in ("scaling", "softcap", "dropout") if options.get(name) is not None}
    unknown = [name for name, value in options.items() if isinstance(value, (Tensor, nn.Parameter)) and name not in _HARMLESS]
    if unknown:
        raise UnsupportedAttentionError(f"its attention takes {unknown[0]}")
    return AttentionSettings(window, **known)


def try_packing(model: nn.Module, backend: Backend, segments: bool = False) -> AttentionCalls:
    """Make a model attend by packings, optionally by segments, if that gives its own numbers; otherwise restore it.

    Returns:
        What its layers request from attention.

    Raises:
        UnsupportedAttentionError: If the model cannot be packed.
    """
    base = base_model(model)
    original = getattr(base.config, "_attn_implementation", None)
    try:
        expected = expected_windows(base.config.get_text_config())
        use_packing(base)
        return _check(model, backend, segments, expected)
    except UnsupportedAttentionError:
        if original is not None:
            base.set_attn_implementation(original)
        raise


def _check(model: nn.Module, backend: Backend, segments: bool, expected: list[int | None]) -> AttentionCalls:
    """What the layers request; raises UnsupportedAttentionError unless packed and padded sequences give the same logits."""
    calls = AttentionCalls()

    def packed_hidden(sequences: Sequences) -> Tensor:
        packed = PackedSequences(sequences, backend, segments=segments)
        hidden = own_hidden(model, packed.ids, packed.positions, packed, attention_calls=calls)
        windows = [settings.window for settings in calls.settings]
        if windows != expected:
            raise UnsupportedAttentionError(
                f"its {len(expected)} layers attended {len(windows)} times, with windows "
                f"{sorted(map(str, set(windows)))} where its config has {sorted(map(str, set(expected)))}"
            )
        return packed.predicting(hidden)

    if difference := _why_not_alike(model, backend, packed_hidden):
        raise UnsupportedAttentionError(f"packed sequences change its logits {difference}")
    return calls


def why_not_shared(model: nn.Module, backend: Backend) -> str:
    """Why `padded_hidden` cannot read a model's prompts and completions; empty where it can."""
    try:
        difference = _why_not_alike(model, backend, lambda sequences: padded_hidden(model, sequences))
        reason = difference and f"copies of its cache change its logits {difference}"
    except UnsupportedAttentionError as error:
        reason = str(error)
    if reason:
        logger.warning(
            "%s is trained with prompts recomputed for each completion, which is slower and takes more memory: %s",
            type(base_model(model)).__name__,
            reason,
        )
    return reason


def try_boundaries(model: nn.Module, backend: Backend) -> bool:
    """Make a recurrent model attend by packings if `packed_rows_hidden` gives its own numbers; returns whether it does."""
    base = base_model(model)
    if not _CARRYING.intersection(getattr(base.config.get_text_config(), "layer_types", None) or ()):
        return False
    original = str(base.config._attn_implementation)
    try:
        # Unlike `use_packing`, check no flag: some of these models call transformers' attention interface without declaring it.
        base.set_attn_implementation(register_packed(original.removeprefix(_PREFIX)))
        if not _why_not_alike(model, backend, lambda sequences: _kept_apart(model, sequences, backend)):
            return True
    except UnsupportedAttentionError as error:
        logger.debug("%s is not packed: %s", type(base).__name__, error)  # usually because the kernels are not installed
    base.set_attn_implementation(original)
    return False


def _kept_apart(model: nn.Module, sequences: Sequences, backend: Backend) -> Tensor:
    """`packed_rows_hidden`, after a check that tokens of earlier rows do not change the last row's states.

    Comparing logits would not be enough: in 16 bits a state that leaks into the next row changes them little more than rounding.

    Raises:
        UnsupportedAttentionError: If the states change.
    """
    last, mask = int(sequences.sampled_mask[-1].sum()), sequences.prompt_mask.clone()
    mask[-1, :-1] = False  # leave one prompt token in the last row, so that a leaked state reaches its first prediction
    some = replace(sequences, prompt_mask=mask)
    turned = (torch.cat([ids[:-1].flip(1), ids[-1:]]) for ids in (some.prompt_ids, some.completion_ids))
    other = replace(some, **dict(zip(("prompt_ids", "completion_ids"), turned, strict=True)))
    found, expected = (packed_rows_hidden(model, of, backend)[-last:] for of in (other, some))
    # A tolerance, since experts may compute in other groups and round differently.
    if (found - expected).norm() > (1e-3 if expected.dtype in HALF else 1e-5) * expected.norm():
        raise UnsupportedAttentionError("its layers carry their state from one packed sequence into the next")
    return packed_rows_hidden(model, sequences, backend)


def _why_not_alike(model: nn.Module, backend: Backend, predicting: Callable[[Sequences], Tensor]) -> str:
    """How far the logits of the states from `predicting` are from the model's own; empty within the tolerance.

    Raises:
        UnsupportedAttentionError: If `predicting` fails for this model.
    """
    base = base_model(model)
    parameter = next(base.parameters())
    sequences = _example(base.config.get_text_config().vocab_size, parameter.device)
    training = [(module, module.training) for module in base.modules()]
    base.eval()  # no dropout, and no gradient checkpointing
    try:
        with torch.no_grad():
            try:
                with backend.in_pass():
                    hidden = predicting(sequences)
            except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, StopIteration) as error:
                raise UnsupportedAttentionError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
            logits = project(base, backend, hidden).float()
            reference = separate_logits(model, sequences)[sequences.sampled_mask].float()
    finally:
        for module, mode in training:
            module.training = mode
    difference = float((logits - reference).norm() / (reference - reference.mean()).norm())
    halves = torch.is_autocast_enabled(reference.device.type)
    tolerance = _TOLERANCE[torch.bfloat16 if halves else parameter.dtype]
    return "" if difference <= tolerance else f"by {difference:.2g} of their size"


def expected_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer according to the config; None for a layer that sees everything."""
    window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else None] * count
    for kind in sorted(set(kinds) - _KNOWN_LAYERS):
        if kind in _CARRYING:
            raise UnsupportedAttentionError(f"its {kind} layers would carry their state from one packed sequence into the next")
        raise UnsupportedAttentionError(f"it has layers of kind {kind}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _example(vocabulary: int, device: torch.device) -> Sequences:
    """Two prompts, of 5 and 3 tokens, the first with two completions."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (3, 9), generator=draw).to(device)
    tokens[1, :5] = tokens[0, :5]
    prompt_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], device=device).bool()
    completion_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], device=device).bool()
    return Sequences(tokens[:, :5], prompt_mask, tokens[:, 5:], completion_mask)

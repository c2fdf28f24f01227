"""The CPU kernels as functions of tensors. Callers check `usable` first, and fall back to torch."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lightning.runner.cpu.build import library, why_none

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_KINDS = {Tensor, torch.nn.Parameter}  # no subclasses, such as distributed tensors
_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [_POINTER] * 4 + [_INTEGER] * 2 + [_FLOAT],
    "rms_norm_backward": [_POINTER] * 5 + [_INTEGER] * 2,
    "gated_silu": [_POINTER] * 3 + [_INTEGER] * 4,
    "gated_silu_backward": [_POINTER] * 5 + [_INTEGER],
    "rotary": [_POINTER] * 4 + [_INTEGER] * 5 + [_FLOAT],
    "with_low_rank": [_POINTER] * 3 + [_INTEGER] * 4,
    "add_low_rank": [_POINTER] * 5 + [_INTEGER] * 5 + [_FLOAT],
    "low_rank_gradients": [_POINTER] * 8 + [_INTEGER] * 6 + [_FLOAT],
    "float_logits": [_POINTER] * 5 + [_INTEGER] * 3,
    "draw_tokens": [_POINTER] * 4 + [_INTEGER] * 2 + [_FLOAT],
    "token_logprobs": [_POINTER] * 4 + [_INTEGER] * 2 + [_FLOAT, _INTEGER],
    "decode_attention": [_POINTER] * 11 + [_INTEGER] * 8 + [_FLOAT] + [_INTEGER] * 3,
    "packed_attention": [_POINTER] * 6 + [_INTEGER] * 5 + [_FLOAT] + [_INTEGER] * 3,
    "packed_attention_backward": [_POINTER] * 9 + [_INTEGER] * 5 + [_FLOAT] + [_INTEGER] * 3,
}


def usable(*tensors: Tensor) -> bool:
    """Whether kernels support these tensors: on the CPU, all float32 or all bfloat16."""
    dtype = tensors[0].dtype
    for part in tensors:  # called some hundred times per token, so no generator
        if part.dtype is not dtype or not part.is_cpu or type(part) not in _KINDS:
            return False
    return dtype in _SUFFIX and library() is not None


def why_unusable(dtype: torch.dtype) -> str:
    """Why no kernels support this dtype on the CPU, worded for the user; empty where they do."""
    if library() is None:
        return why_none() or "they are turned off"
    known = f"they compute with float32 and bfloat16, and the model with {str(dtype).partition('.')[2]}"
    return "" if dtype in _SUFFIX else known


@cache
def _function(name: str, dtype: torch.dtype) -> Any:
    kernels = library()
    assert kernels is not None, "callers check `usable` first"
    address = ctypes.c_void_p.in_dll(kernels, f"{name}_{_SUFFIX[dtype]}").value
    assert address is not None
    return ctypes.CFUNCTYPE(None, *_SIGNATURES[name])(address)


def _call(name: str, tensors: Sequence[Tensor | None], *numbers: Any) -> None:
    """Call a compiled function, for the dtype of the first tensor, with the tensors' addresses and the numbers."""
    first = tensors[0]
    assert first is not None
    _function(name, first.dtype)(*[None if part is None else part.data_ptr() for part in tensors], *numbers)


def _dense(part: Tensor) -> Tensor:
    """The tensor with a contiguous last axis, copied if necessary."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _floats(*shape: int) -> Tensor:
    """An empty float32 tensor on the CPU, whatever torch's default dtype and device are: precision plugins set them."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm of x [..., n], and 1 / sqrt(mean(x^2) + eps), [..., 1] float32."""
    x, size = x.contiguous(), x.shape[-1]
    result, inverses = torch.empty_like(x), _floats(*x.shape[:-1], 1)
    _call("rms_norm", (x, weight, result, inverses), x.numel() // size, size, eps)
    return result, inverses


def rms_norm_backward(outer: Tensor, x: Tensor, weight: Tensor, inverses: Tensor) -> Tensor:
    """Gradient of x [..., n] from the gradient of `rms_norm`."""
    outer, x, size = outer.contiguous(), x.contiguous(), x.shape[-1]
    result = torch.empty_like(x)
    _call("rms_norm_backward", (outer, x, weight, inverses, result), x.numel() // size, size)
    return result


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, [..., n]."""
    result, size = gate.new_empty(gate.shape), gate.shape[-1]
    gate, up = (_dense(part.reshape(-1, size)) for part in (gate, up))
    _call("gated_silu", (gate, up, result), len(gate), size, gate.stride(0), up.stride(0))
    return result


def gated_silu_backward(outer: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from the gradient of `gated_silu`."""
    outer, gate, up = outer.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _call("gated_silu_backward", (outer, gate, up, of_gate, of_up), gate.numel())
    return of_gate, of_up


def rotary(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool = False) -> Tensor:
    """Rotary position embedding of x [N, heads, D], or its transpose; contiguous. Cosines and sines are [N, D]."""
    x = _dense(x)
    result = x.new_empty(x.shape)
    sizes = (*x.shape, x.stride(0), x.stride(1))
    _call("rotary", (x, cosines, sines, result), *sizes, -1.0 if transposed else 1.0)
    return result


def with_low_rank(x: Tensor, down: Tensor) -> Tensor:
    """[x, x A'] [N, n + r] for x [N, n] and A [r, n]. A is float32 and contiguous."""
    x = _dense(x)
    rank, (count, size) = len(down), x.shape
    result = x.new_empty(count, size + rank)
    _call("with_low_rank", (x, down, result), count, size, rank, x.stride(0))
    return result


# `at::native::cpublas::brgemm` and `brgemm_release` of ATen/native/CPUBlas.h; torch's compiler generates calls to them, too. The
# mangled names contain the argument types, so a torch with other types does not have them.
_BRGEMM = ("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "_ZN2at6native7cpublas14brgemm_releaseEb")


@cache
def _brgemm() -> tuple[int | None, ...]:
    """Addresses of torch's bfloat16 product with a float32 result, which no operator offers on CPUs; empty if it fails."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = tuple(ctypes.cast(getattr(torch_cpu, name), _POINTER).value for name in _BRGEMM)
    except (OSError, AttributeError):
        return ()
    numbers, logits = (ctypes.c_uint16 * 4)(0, 0x3F80, 0x4000, 0x4040), ctypes.c_float()  # 0 to 3
    _function("float_logits", torch.bfloat16)(numbers, numbers, ctypes.byref(logits), *found, 1, 4, 1)
    return found if logits.value == 0 + 1 + 4 + 9 else ()


def multiplies_to_floats(weight: Tensor) -> bool:
    """Whether `float_logits` supports a weight that is `usable`."""
    even = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return even and torch._C._get_mkldnn_enabled() and bool(_brgemm())


def float_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [N, V] float32 of bfloat16 hidden states [N, H] and weight [V, H], never rounded to bfloat16."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    _call("float_logits", (hidden, weight, logits), *_brgemm(), *hidden.shape, len(weight))
    return logits


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits [B, V], given uniform random numbers in [0, 1), [B, 1] float64.

    Returns:
        Tokens [B] int64, and their log-probabilities [B] float32.
    """
    logits, uniform = logits.contiguous(), uniform.contiguous()
    tokens, logprobs = logits.new_empty(len(logits), dtype=torch.long), _floats(len(logits))
    _call("draw_tokens", (logits, uniform, tokens, logprobs), *logits.shape, 1 / temperature)
    return tokens, logprobs


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float, slopes: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens [K] and entropies [K], float32, under contiguous logits [K, V].

    With `slopes` the logits are overwritten by onehot(token) - p.

    Raises:
        IndexError: If a token is not in the vocabulary: the kernel would write outside the logits.
    """
    tokens = tokens.contiguous()
    if ((tokens < 0) | (tokens >= logits.shape[1])).any():
        raise IndexError(f"tokens from {int(tokens.min())} to {int(tokens.max())} for logits of {logits.shape[1]} tokens")
    logprobs, entropies = _floats(len(logits)), _floats(len(logits))
    _call("token_logprobs", (logits, tokens, logprobs, entropies), *logits.shape, 1 / temperature, slopes)
    return logprobs, entropies


# Largest size of both factors together for which the kernels beat libraries: with 4,096 numbers they take 0.5 to 0.9 of the time,
# with 33,792 the same time forward and 1.0 to 1.4 of it backward (two threads of a Zen 4, 912 and 655 rows).
_MOST = 16_384


def low_rank_pays(down: Tensor, up: Tensor) -> bool:
    """Whether the kernels are faster than torch's products for factors A and B of these sizes."""
    return down.numel() + up.numel() <= _MOST


def add_low_rank(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Add s (x A') B' in place to a contiguous result [N, m], with x [N, n], A [r, n] and B [m, r].

    Returns:
        x A', [N, r], which the gradients need.
    """
    x, rank = _dense(x), len(down)
    low = x.new_empty(len(x), rank)
    sizes = (len(x), x.shape[1], len(up), rank, x.stride(0))
    _call("add_low_rank", (x, down.contiguous(), up.contiguous(), result, low), *sizes, scaling)
    return low


def low_rank_gradients(
    outer: Tensor, x: Tensor, low: Tensor, down: Tensor, up: Tensor, scaling: float, of_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of A [r, n] and B [m, r] from the gradient of the result, [N, m], x [N, n] and x A' [N, r].

    The gradient of x is added in place to the contiguous `of_x` [N, n]; None skips it.
    """
    outer, x, rank = _dense(outer), _dense(x), len(down)
    down, up = down.contiguous(), up.contiguous()
    of_down, of_up = torch.empty_like(down), torch.empty_like(up)
    tensors = (outer, x, low.contiguous(), down, up, of_x, of_down, of_up)
    sizes = (len(x), x.shape[1], len(up), rank, outer.stride(0), x.stride(0))
    _call("low_rank_gradients", tensors, *sizes, scaling)
    return of_down, of_up


# ---- attention; axes as in `runner/attention.py`, with N tokens in one packed sequence

DECODED_HEAD_SIZES = {32, 64, 96, 128, 256}  # values of D that `decode_attention` is compiled for


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    slots: Tensor,
    counts: Tensor,
    lengths: Tensor,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention of N new tokens of completions. Their keys and values are appended to the completions' own.

    Args:
        query: [N, H, D].
        key: [N, K, D].
        value: [N, K, D].
        prompt: Keys and values of the prompts, [P, K, S, D] each, padded on the right; contiguous.
        own: Keys and values of the completions, [P, K, G, capacity, D] each; contiguous.
        slots: The slot of each token's completion, [N] int64, an index into the flattened [P, G].
        counts: Tokens of its completion up to and including the new one, [N] int64.
        lengths: Tokens of each prompt, [P] int64.
        window: A token sees this many positions; None for all.
        scaling: Factor of the scores.
    """
    heads, (count, all_heads, size) = key.shape[1], query.shape
    new = [_dense_tokens(part) for part in (query, key, value)]
    result = query.new_empty(query.shape)
    tensors = (*new, *prompt, *own, slots, counts, lengths, result)
    sizes = (count, own[0].shape[2], heads, all_heads // heads, prompt[0].shape[2], own[0].shape[3], size)
    strides = [part.stride(0) for part in new]
    _call("decode_attention", tensors, *sizes, window or 0, scaling, *strides)
    return result


def _dense_tokens(part: Tensor) -> Tensor:
    """The tensor [N, heads, D] with contiguous tokens, copied if necessary."""
    return part if part.stride(2) == 1 and part.stride(1) == part.shape[2] else part.contiguous()


class Groups(NamedTuple):
    """Prompts and completions as segments of N packed tokens. A group is a prompt and its completions.

    Tensors are int64 and contiguous.
    """

    segments: Tensor  # [count, 2]: begin and end of each segment, group by group, each prompt before its completions
    first: Tensor  # [groups + 1]: the index of each group's first segment, then the count


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float) -> Tensor:
    """Attention of every token, [N, H, D], to its prompt's keys and to its own segment's keys up to itself, [N, K, D] each.

    A token sees `window` positions, counted over prompt and completion; None for all.
    """
    parts = [_dense_tokens(part) for part in (query, key, value)]
    result = query.new_empty(query.shape)
    _call("packed_attention", (*parts, result, *groups), *_packed_numbers(parts, groups, window, scaling))
    return result


def packed_attention_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the gradient of `packed_attention`."""
    parts = [_dense_tokens(part) for part in (query, key, value)]
    results = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    numbers = _packed_numbers(parts, groups, window, scaling)
    _call("packed_attention_backward", (*parts, outer.contiguous(), *results, *groups), *numbers)
    return results


def _packed_numbers(parts: Sequence[Tensor], groups: Groups, window: int | None, scaling: float) -> tuple[Any, ...]:
    query, key, _ = parts
    heads = (key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
    return len(groups.first) - 1, *heads, window or 0, scaling, *(part.stride(0) for part in parts)

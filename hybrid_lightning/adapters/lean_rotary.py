"""Rotary position embeddings of the base model by one kernel, where transformers' function is ten operations.

Attention layers call that function by its name in their file. Where it is Llama's, word for word, a layer gets a class with the
same forward pass that finds a `rotary` under the name.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

from hybrid_lightning.adapters.words import words
from hybrid_lightning.kernels import calls as kernels

_NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def use_lean_rotary(model: nn.Module) -> None:
    """Let the model's attention layers rotate queries and keys by a kernel, where there is one."""
    for module in model.modules():
        lean = _lean(type(module))  # type: ignore[arg-type]
        if lean is not None:
            module.__class__ = lean


@cache
def _lean(kind: type[nn.Module]) -> type[nn.Module] | None:
    """A class like an attention layer's of transformers whose forward pass calls `rotary`; None for all others."""
    forward = inspect.unwrap(kind.forward)
    theirs = getattr(sys.modules[kind.__module__], _NAME, None)
    if not kind.__module__.startswith("transformers.") or theirs is None or _NAME not in forward.__code__.co_names:
        return None
    if words(theirs) != words(modeling_llama.apply_rotary_pos_emb):
        return None
    names = {**forward.__globals__, _NAME: partial(rotary, theirs)}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": same, "__module__": kind.__module__})


def rotary(theirs: Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, heads, N, D] rotated by cos and sin [B, N, D]; by `theirs`, what has no kernel."""
    size = q.shape[-1]
    fit = unsqueeze_dim == 1 and q.dim() == 4 and size % 2 == 0 and k.shape[-1] == cos.shape[-1] == size
    if not fit or cos.requires_grad or not kernels.usable_in_layers(q, k, cos, sin):
        return theirs(q, k, cos, sin, unsqueeze_dim)
    cosines, sines = (part.expand(q.shape[0], -1, -1).flatten(0, 1).contiguous() for part in (cos, sin))
    if not torch.is_grad_enabled():
        return _rotated(q, cosines, sines, False), _rotated(k, cosines, sines, False)
    return _Rotary.apply(q, cosines, sines), _Rotary.apply(k, cosines, sines)  # type: ignore[no-untyped-call]


def rotary_of_tokens(theirs: Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same of queries and keys [N, heads, D] by cos and sin [N, D], without a gradient.

    Args:
        theirs: A layer's function, which may be a `rotary`.
        q: [N, H, D].
        k: [N, K, D].
        cos: [N, D], contiguous.
        sin: [N, D], contiguous.
    """
    ours = isinstance(theirs, partial) and theirs.func is rotary and q.shape[-1] % 2 == 0
    if ours and kernels.usable_in_layers(q, k, cos, sin) and k.shape[-1] == cos.shape[-1] == q.shape[-1]:
        return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
    query, key = theirs(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


def without_kernel(function: Rotary) -> Rotary:
    """Transformers' own function of a layer whose function may be a `rotary`."""
    theirs: Rotary = function.args[0] if isinstance(function, partial) and function.func is rotary else function
    return theirs


class _Rotary(torch.autograd.Function):
    """One of both; it keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, sines, True), None, None


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    """[B, heads, N, D]; in memory heads of a token lie together, as layers make and attention takes them."""
    tokens = x.transpose(1, 2)
    return kernels.rotary(tokens.flatten(0, 1), cosines, sines, transposed).view(tokens.shape).transpose(1, 2)

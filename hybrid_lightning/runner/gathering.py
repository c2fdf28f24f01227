"""Gathering packed tokens by index, with gradients that are added up in a fixed order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Grid:
    """Maps packed tokens to places in a rectangle that is padded on the right, and back."""

    shape: tuple[int, ...]  # of the rectangle; the last axis runs over the tokens of one sequence
    valid: Tensor  # bool, in that shape
    lengths: Tensor  # tokens of each sequence
    filled: bool  # no padding at all
    to_grid: Tensor  # for each place of the flattened rectangle, the index of its token; at padding, the index of another token
    to_packed: Tensor  # for each token, the index of its place

    @classmethod
    def of(cls, valid: Tensor) -> "Grid":
        """Build the grid from a mask of the places that hold a token."""
        count = int(valid.sum())
        number = valid.flatten().cumsum(0) - 1
        # Padding repeats the last token of its sequence, so that attention finds finite numbers there.
        return cls(
            tuple(valid.shape),
            valid,
            valid.sum(dim=-1),
            count == valid.numel(),
            number.clamp(min=0),
            valid.flatten().nonzero().squeeze(1),
        )

    def cut(self, packed: Tensor) -> Tensor:
        """[tokens, ...] -> [*shape, ...]."""
        grid = packed if self.filled else taken(packed, self.to_grid, self.to_packed)
        return grid.reshape(*self.shape, *packed.shape[1:])

    def paste(self, grid: Tensor) -> Tensor:
        """[*shape, ...] -> [tokens, ...]."""
        places = grid.flatten(0, len(self.shape) - 1)
        return places if self.filled else taken(places, self.to_packed, self.to_grid, self.valid.flatten())


@dataclass(frozen=True)
class Repeated:
    """Values that `taken` takes more than once."""

    numbers: Tensor  # [P], indices of the values
    places: Tensor  # [P, G], where each goes in the result
    valid: Tensor  # [P, G] bool: False where a value is taken fewer than G times


def ordered_sums(gradient: Tensor, places: Tensor, valid: Tensor) -> Tensor:
    """Add up the gradients [places, ...] of values that were taken several times; see `Repeated`.

    The sum is at least float32 and runs in the order of the places.
    """
    parts = gradient.index_select(0, places.flatten()).unflatten(0, places.shape)
    parts = parts.masked_fill_(~valid.view(*valid.shape, *[1] * (gradient.dim() - 1)), 0)
    return parts.sum(dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32)).to(gradient.dtype)


def taken(
    values: Tensor, index: Tensor, inverse: Tensor, valid: Tensor | None = None, repeated: Repeated | None = None
) -> Tensor:
    """`index_select` along the first axis, with a backward pass that is an `index_select` as well.

    Each value goes to one place, except padding, which needs no gradient, and the values in `repeated`. torch's own backward
    pass adds value by value, which on a CPU takes longer than the attention itself. On a GPU, and for `values[index]` on a CPU,
    torch adds with atomics, in an order that varies between runs. Here the gradients of repeated values are added up in a fixed
    order.

    Args:
        values: [n, ...].
        index: Indices of the values to take, [m].
        inverse: For each value, the place it goes to, [n].
        valid: Which values get the gradient of their place, [n] bool; the others get none. None for all.
        repeated: Values that are taken more than once.
    """
    return _Gather.apply(values, index, inverse, valid, repeated)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, valid: Tensor | None, repeated: Repeated | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, valid)
        ctx.repeated = repeated
        return values.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, valid = ctx.saved_tensors
        if not len(gradient):  # nothing was taken
            return gradient.new_zeros(len(inverse), *gradient.shape[1:]), None, None, None, None
        result = gradient.index_select(0, inverse)
        if valid is not None:  # padding got no gradient
            result = result.masked_fill_(~valid.view(-1, *[1] * (result.dim() - 1)), 0)
        if ctx.repeated is not None:
            result.index_copy_(0, ctx.repeated.numbers, ordered_sums(gradient, ctx.repeated.places, ctx.repeated.valid))
        return result, None, None, None, None

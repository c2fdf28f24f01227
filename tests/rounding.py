"""How far apart two results of the same sums may lie, when another processor adds in another order.

A sum of n numbers, or a chain of sums, is rounded n times, by half of the dtype's epsilon each time, as often up as down: the
errors add up like the square root of n (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). Both
results are off by that, so that they differ by epsilon sqrt(n), relative to the size of what is added. Four times that leaves
room for other orders, vectors, threads and products; mistakes, such as a scale that is off by a thousandth, are far beyond it.
"""

import math

import torch
from torch import nn

_ROOM = 4
_TINY = 700  # additions of the tiny models, a few more or less
LOGITS = 4.0  # what log-probabilities and entropies, which may be near 0, are made of in the tiny models


def spread(additions: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of two results, relative to the size of what is added; of numbers around 1 the difference itself."""
    return _ROOM * math.sqrt(additions) * torch.finfo(dtype).eps


def metrics_of_runs() -> dict[str, float]:
    """For `pytest.approx`: metrics of a tiny model's steps (means over tokens, and norms and losses of some of them).

    Some are nothing but rounding, such as the distance between the log-probabilities of sampling and of training.
    """
    return {"abs": LOGITS * spread(_TINY), "rel": spread(3 * _TINY)}


def additions_of(model: nn.Module, tokens: int, backward: bool = False) -> int:
    """Number of additions with a rounding that reaches a logit, or a weight's gradient.

    Args:
        model: Each of its projections adds as many products as its weight is long.
        tokens: How many the attention of each layer adds: of one sequence, or of all for a gradient, which is a sum over them.
        backward: Whether it is a gradient: two more sums for each of the forward pass, over outputs and over tokens.
    """
    shapes = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2]
    forward = sum(max(shape) for shape in shapes) + tokens * model.config.num_hidden_layers
    return 3 * forward if backward else forward


def assert_same_sums(found, expected, additions: int, size: float = 0.0, name: str | None = None) -> None:
    """Tensors, or tuples, lists and dicts of them, are the same sums: apart by `spread` of each tensor's largest number.

    Args:
        found: The one result.
        expected: The other.
        additions: See `additions_of`.
        size: Of what is added, where results may be smaller than that.
        name: Shown where they differ.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_sums(found[key], value, additions, size, name=str(key))
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_sums(one, other, additions, size, name=name or str(number))
    else:
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        bound = spread(additions, expected.dtype) * max(size, largest)
        torch.testing.assert_close(found, expected, atol=bound, rtol=0, msg=lambda text: f"{name}: {text}" if name else text)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of the same weights in a tiny model agree, such as LoRA beside a weight and merged into it."""
    assert_same_sums(found, expected, _TINY)

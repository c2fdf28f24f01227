"""`MasterWeights`: an optimizer that trains bfloat16 weights as exactly as float32 ones.

A bfloat16 weight has 8 bits of precision: the neighbours of 0.05 are 0.0002 away, so that a step of 1e-6 is rounded off, however
often it is made. So each trained weight is a float32 number in two halves:

    w = high + low,   high = w rounded to bfloat16: the model's parameter, which computes, is gathered, and samples
                      low  = the other 16 bits: known to the optimizer alone

For a step the halves are joined, the user's optimizer makes its step in float32, with moments in float32, and the result is split
again. The weights are then those of float32 training under autocast, which rounds them to bfloat16 in every pass. With Adam they
take 14 bytes per number (2 high, 2 gradient, 2 low, 8 moments) instead of 16, and 2 instead of 4 where they are gathered.

Weights are split in this way in Split-SGD (arXiv 2005.04680). Stochastic rounding would save the 2 bytes of `low`, but add noise
that is larger than small steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError

MASTER = "master_weight"  # key of the float32 weight in a saved state
_LOW = "low_bits"  # key of its lower half in the state in memory
# A step joins weights of at most so many numbers at a time, or one larger weight: 64 MiB for each temporary float32 copy.
_CHUNK = 2**24


class MasterWeights(Optimizer):
    """Wraps an optimizer, which then trains bfloat16 weights as float32 ones.

    The `state_dict` has the state of the wrapped optimizer, and the float32 weights under `master_weight`. Loading it sets the
    weights to those in it, and rounds no value of the state.

    Args:
        optimizer: Makes the wrapped optimizer of parameter groups. It must treat each parameter by itself, since a step is made
            for some parameters at a time. All optimizers of torch but LBFGS do, and so do those of bitsandbytes.
        groups: Parameter groups of bfloat16 weights, which may be split over ranks as `DTensor`.
    """

    def __init__(self, optimizer: Callable[[Iterable], Optimizer], groups: list[dict[str, Any]]) -> None:
        weights = [weight for group in groups for weight in group["params"]]
        assert all(weight.dtype == torch.bfloat16 for weight in weights)
        device = weights[0].device
        self._inner = optimizer([{**group, "params": [nn.Parameter(torch.zeros(0, device=device))]} for group in groups])
        super().__init__(groups, self._inner.defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make a step on the float32 weights; ConfigError if the wrapped optimizer does not treat each parameter by itself."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({name: value for name, value in mine.items() if name != "params"})
        for chunk in self._chunks():
            self._step(chunk)
            self._check_groups()
        return loss

    def _check_groups(self) -> None:
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            if mine.keys() != inner.keys() or any(inner[name] is not mine[name] for name in mine.keys() - {"params"}):
                raise ConfigError(
                    f"model.optimizer={type(self._inner).__name__} keeps a state of whole groups, which would be changed by each "
                    "part of a step under trainer.precision=bf16-true; use torch.optim.AdamW, or bf16-mixed"
                )

    def _step(self, chunk: list[tuple[int, nn.Parameter]]) -> None:
        """Make a step for some weights, each given with the number of its group."""
        masters = [(weight, nn.Parameter(self._master(weight))) for _, weight in chunk]
        self._empty_inner()
        for (number, weight), (_, master) in zip(chunk, masters, strict=True):
            master.grad = weight.grad.to(torch.float32)  # type: ignore[union-attr]
            self._inner.param_groups[number]["params"].append(master)
            self._inner.state[master] = {name: value for name, value in self.state[weight].items() if name != _LOW}
        self._inner.step()
        for weight, master in masters:
            low = self.state[weight].get(_LOW)
            self.state[weight] = {**self._inner.state[master], _LOW: _split(_local(master), _local(weight), low)}
        self._empty_inner()

    def _empty_inner(self) -> None:
        """Take all parameters and their state out of the wrapped optimizer."""
        self._inner.state.clear()
        for group in self._inner.param_groups:
            group["params"] = []

    def _chunks(self) -> Iterator[list[tuple[int, nn.Parameter]]]:
        """The weights that have a gradient, each with the number of its group, in lists of at most `_CHUNK` numbers."""
        chunk: list[tuple[int, nn.Parameter]] = []
        count = 0
        weights = [(number, weight) for number, group in enumerate(self.param_groups) for weight in group["params"]]
        for number, weight in weights:
            if weight.grad is None:
                continue
            if chunk and count + _local(weight).numel() > _CHUNK:
                yield chunk
                chunk, count = [], 0
            chunk.append((number, weight))
            count += _local(weight).numel()
        if chunk:
            yield chunk

    def _master(self, weight: nn.Parameter) -> Tensor:
        """The float32 value of a weight, split over ranks as the weight is."""
        low = self.state[weight].get(_LOW)
        master = torch.empty_like(weight, dtype=torch.float32, requires_grad=False)
        _local(master).copy_(_local(weight) if low is None else _join(_local(weight), low))
        return master

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, keyed by the number of the parameter as in every optimizer, with the float32 weights."""
        content = super().state_dict()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, entry in content["state"].items():
            others = {name: value for name, value in entry.items() if name != _LOW}
            content["state"][number] = {**others, MASTER: self._master(weights[number])}
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, whose parameters may have other numbers; torch's own method would round it to the weights' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for number, weight in zip(saved["params"], group["params"], strict=True):
                entry = dict(state_dict["state"].get(number, {}))
                if not entry:
                    continue
                master = entry.pop(MASTER).to(weight.device)
                on_cpu = () if group.get("fused") or group.get("capturable") else ("step",)
                for name, value in entry.items():
                    moves = isinstance(value, Tensor) and name not in on_cpu
                    entry[name] = value.to(weight.device, copy=True) if moves else value
                self.state[weight] = {**entry, _LOW: _split(_local(master), _local(weight), None)}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers whose upper halves are `high`, bfloat16, and whose lower 16 bits are `low` (see `_split`)."""
    bits = high.view(torch.int16).to(torch.int32).mul_(2**16).add_(low)
    return bits.view(torch.float32)


def _split(value: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """Write float32 numbers into `high`, rounded to bfloat16, and what is left into `low`; returns `low`.

    What is left is the difference of the bits, read as whole numbers, from -2^15 to 2^15 - 1. It is -2^15 for a value halfway
    between two bfloat16 numbers that was rounded up, to the even one. A halfway value that was rounded down, one in 131072, would
    need 2^15: it is kept one step of float32 nearer to zero, so that `high` is what autocast makes of the weight.
    """
    high.copy_(value)
    left = value.view(torch.int32) - high.view(torch.int16).to(torch.int32).mul_(2**16)
    low = torch.empty_like(high, dtype=torch.int16) if low is None else low
    return low.copy_(left.clamp_(max=2**15 - 1))

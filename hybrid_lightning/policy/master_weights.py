"""`MasterWeights`: an optimizer for bfloat16 weights in which no step is lost.

A bfloat16 weight has 8 bits of precision: at 0.05 the next one is 0.0002 away, and a step of 1e-6 is rounded off, however often
it is made. So each trained weight is a float32 number in two halves:

    w = high + low,   high = w rounded to bfloat16: the weight that computes, is gathered, and samples
                      low  = the other 16 bits: known to the optimizer alone

For a step the halves are joined, the optimizer that was asked for makes its step in float32, with moments in float32, and the
result is split again. The weights are those of float32 training under autocast, which rounds them to bfloat16 in every pass; with
Adam they take 14 bytes a number (2 high, 2 gradient, 2 low, 8 moments) instead of 16, and 2 instead of 4 where they are gathered.
Splitting weights in this way is known from Split-SGD (arXiv 2005.04680). Rounding stochastically would save the 2 bytes of `low`
and cost noise, which is larger than the steps where these are small.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError

MASTER = "master_weight"  # its name in saved states
_LOW = "low_bits"  # and that of its lower half in memory
# Numbers that are joined at a time: what a step needs beside the state is 64 MiB for each copy, or one module's.
_CHUNK = 2**24


class MasterWeights(Optimizer):
    """Lets an optimizer train bfloat16 weights as float32 ones.

    Its `state_dict` has, beside the state of that optimizer, the float32 weights under `master_weight`; no value of it is rounded
    when it is loaded, and the weights are set to those that it holds.

    Args:
        optimizer: Called with parameter groups. It must be one that takes each parameter for itself, as those of torch and
            bitsandbytes do, LBFGS aside: it is given some of them at a time.
        groups: Parameter groups of bfloat16 weights, split over ranks as `DTensor` or not.
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
        """Make a step of the optimizer on the float32 weights.

        Args:
            closure: Computes the gradients and returns the loss.

        Raises:
            ConfigError: If the optimizer does not take each parameter for itself.
        """
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
        """A step of some weights, each given with the number of its group."""
        masters = [(weight, nn.Parameter(self._master(weight))) for _, weight in chunk]
        self._forget()
        for (number, weight), (_, master) in zip(chunk, masters, strict=True):
            master.grad = weight.grad.to(torch.float32)  # type: ignore[union-attr]
            self._inner.param_groups[number]["params"].append(master)
            self._inner.state[master] = {name: value for name, value in self.state[weight].items() if name != _LOW}
        self._inner.step()
        for weight, master in masters:
            low = self.state[weight].get(_LOW)
            self.state[weight] = {**self._inner.state[master], _LOW: _split(_local(master), _local(weight), low)}
        self._forget()

    def _forget(self) -> None:
        """Let the optimizer hold nothing."""
        self._inner.state.clear()
        for group in self._inner.param_groups:
            group["params"] = []

    def _chunks(self) -> Iterator[list[tuple[int, nn.Parameter]]]:
        """Weights that have a gradient, with the numbers of their groups, some at a time."""
        chunk: list[tuple[int, nn.Parameter]] = []
        count = 0
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
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
        """The float32 weight, split over ranks as the weight is."""
        low = self.state[weight].get(_LOW)
        master = torch.empty_like(weight, dtype=torch.float32, requires_grad=False)
        _local(master).copy_(_local(weight) if low is None else _join(_local(weight), low))
        return master

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """State by number of the parameter, with the float32 weights."""
        content = super().state_dict()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, entry in content["state"].items():
            others = {name: value for name, value in entry.items() if name != _LOW}
            content["state"][number] = {**others, MASTER: self._master(weights[number])}
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; torch's own would round it to the dtype of the weights.

        Args:
            state_dict: As `state_dict` gives it, in whatever way it numbers parameters.
        """
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for number, weight in zip(saved["params"], group["params"], strict=True):
                entry = dict(state_dict["state"].get(number, {}))
                if not entry:
                    continue
                master = entry.pop(MASTER).to(weight.device)
                stays = () if group.get("fused") or group.get("capturable") else ("step",)
                for name, value in entry.items():
                    moves = isinstance(value, Tensor) and name not in stays
                    entry[name] = value.to(weight.device, copy=True) if moves else value
                self.state[weight] = {**entry, _LOW: _split(_local(master), _local(weight), None)}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _join(high: Tensor, low: Tensor) -> Tensor:
    """bfloat16 and the 16 bits below it as float32."""
    bits = high.view(torch.int16).to(torch.int32).mul_(2**16).add_(low)
    return bits.view(torch.float32)


def _split(value: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """Write float32 into `high`, rounded to bfloat16, and into `low` what is left; returns the latter.

    That is the difference of the bits, read as whole numbers: from -2^15, where the value lies just between two bfloat16 numbers
    and was rounded up to the even one, to 2^15 - 1. A value that was rounded down from there, one of 131072, would need 2^15: it
    is kept one step of float32 nearer to zero, so that `high` is what autocast would make of the weight.
    """
    high.copy_(value)
    left = value.view(torch.int32) - high.view(torch.int16).to(torch.int32).mul_(2**16)
    low = torch.empty_like(high, dtype=torch.int16) if low is None else low
    return low.copy_(left.clamp_(max=2**15 - 1))

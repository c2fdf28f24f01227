"""Learning rate schedules, and the optimizer of a policy, with one learning rate for each group of parameters.

`build_optimizer` makes the return value of `configure_optimizers`. A resumed run takes the optimizer's state from the checkpoint
and its hyper-parameters from its own config (`with_hyper_parameters`).
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hybrid_lightning.errors import ConfigError, one_line
from hybrid_lightning.shared.configurable import Configurable

OptimizerCallable = Callable[[Iterable], Optimizer]

_PROBE_SHAPE = (64, 4096)  # bitsandbytes uses 8 bits only for tensors with at least 4,096 entries
WIDTH_OF_ONE_RATE = 96  # up to this hidden size, fully trained modules use LoRA's learning rate


class LearningRateSchedule(Configurable, ABC):
    """Factor on the learning rates: a linear warm-up, then the factor of a subclass.

    Args:
        warmup_steps: Optimizer steps in which the factor rises from 1 / (warmup_steps + 1) to 1.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps must not be negative, got {warmup_steps}")
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total_steps: float) -> float:
        """Factor at optimizer step `step` (counted from 0) of `total_steps` (infinite if the run has no step limit)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step, total_steps)

    @abstractmethod
    def after_warmup(self, step: int, total_steps: float) -> float:
        """Factor at a step after the warm-up; see `factor` for the arguments."""

    def progress(self, step: int, total_steps: float) -> float:
        """Share of finished steps after the warm-up, in [0, 1]; ConfigError if the run's length is unknown."""
        if math.isinf(total_steps):
            raise ConfigError(
                f"{type(self).__name__} needs the run's length in steps; set trainer.max_steps or trainer.max_epochs, or use "
                "model.schedule=ConstantSchedule"
            )
        return min(1.0, (step - self.warmup_steps) / max(1.0, total_steps - self.warmup_steps))


class ConstantSchedule(LearningRateSchedule):
    """Full learning rate after the warm-up."""

    def after_warmup(self, step: int, total_steps: float) -> float:
        """Always 1."""
        return 1.0


class _FallingSchedule(LearningRateSchedule):
    """Falls from 1 to a factor that it reaches after the last step of the run.

    Args:
        warmup_steps: Optimizer steps in which the factor rises from 1 / (warmup_steps + 1) to 1.
        final_factor: Factor at the end, in [0, 1].
    """

    def __init__(self, warmup_steps: int = 0, final_factor: float = 0.0) -> None:
        super().__init__(warmup_steps)
        if not 0 <= final_factor <= 1:
            raise ConfigError(f"schedule.final_factor must be between 0 and 1, got {final_factor}")
        self.final_factor = final_factor


class LinearSchedule(_FallingSchedule):
    """Straight line from 1 to `final_factor`, which it reaches after the last step of the run."""

    def after_warmup(self, step: int, total_steps: float) -> float:
        """1 - (1 - final_factor) * progress."""
        return 1 - (1 - self.final_factor) * self.progress(step, total_steps)


class CosineSchedule(_FallingSchedule):
    """Half a cosine from 1 to `final_factor`, which it reaches after the last step of the run."""

    def after_warmup(self, step: int, total_steps: float) -> float:
        """final_factor + (1 - final_factor) * (1 + cos(pi * progress)) / 2."""
        cosine = (1 + math.cos(math.pi * self.progress(step, total_steps))) / 2
        return self.final_factor + (1 - self.final_factor) * cosine


@dataclass(frozen=True)
class Optimization:
    """How trainable weights are updated: the optimizer, and one learning rate for each kind of module.

    Args:
        optimizer: Class of the optimizer, or a function that makes it from the parameter groups.
        lr_full: Learning rate of fully trained modules; None for `rate_of_full_modules`.
        lr_lora: Learning rate of LoRA weights.
        schedule: Learning rate schedule.

    Raises:
        ConfigError: If a learning rate is invalid.
    """

    optimizer: OptimizerCallable = AdamW
    lr_full: float | None = None
    lr_lora: float = 1e-4
    schedule: LearningRateSchedule = field(default_factory=ConstantSchedule)

    def __post_init__(self) -> None:
        for name, rate in (("lr_full", self.lr_full), ("lr_lora", self.lr_lora)):
            if rate is not None and not 0 <= rate < float("inf"):
                raise ConfigError(f"model.{name} must be a non-negative number, got {rate}")

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Learning rates of the parameter groups of a model, `full` and `lora`."""
        full = rate_of_full_modules(self.lr_lora, model.config) if self.lr_full is None else self.lr_full
        return {"full": full, "lora": self.lr_lora}

    def of_model(self, model: nn.Module, total_steps: float) -> dict[str, Any]:
        """Return value of `configure_optimizers` for an adapted model in a run of `total_steps` (see `build_optimizer`)."""
        from hybrid_lightning.adapters.apply import parameter_groups  # PEFT is slow to import

        rates, (full, lora) = self.rates(model), parameter_groups(model)
        if self.lr_full is None and full and lora:
            rank_zero_info(f"lr_full: {rates['full']:.3g}, from lr_lora={self.lr_lora:g} and the hidden size")
        groups = {"full": (list(full.values()), rates["full"]), "lora": (list(lora.values()), rates["lora"])}
        return build_optimizer(self.optimizer, groups, self.schedule, total_steps)


def build_optimizer(
    optimizer: OptimizerCallable,
    groups: dict[str, tuple[list[nn.Parameter], float]],
    schedule: LearningRateSchedule,
    total_steps: float,
) -> dict[str, Any]:
    """Make the return value of `configure_optimizers`, from group name -> (parameters, learning rate); empty groups are left out.

    Raises:
        ConfigError: If no parameter is trainable, or if the schedule needs the length of a run without a limit.
    """
    parameter_groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr, "name": name} for name, (parameters, lr) in groups.items() if parameters
    ]
    if not parameter_groups:
        raise ConfigError(
            "the policy has no trainable parameters; add the callback HybridAdapterSetup (share 1 of its budget trains all fully)"
        )
    built = optimizer(parameter_groups)
    schedule.factor(schedule.warmup_steps, total_steps)  # if it needs the run's length, it raises now, not after the warm-up
    scheduler = _Scheduler(built, lambda step: schedule.factor(step, total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}


class _Scheduler(LambdaLR):
    """Scheduler that restores only the step from a checkpoint: a resumed run uses its own learning rates and schedule."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a checkpoint."""
        rates = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = rates
        self._last_lr = [rate * factor(self.last_epoch) for rate, factor in zip(rates, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def with_hyper_parameters(
    groups: Sequence[Mapping[str, Any]], optimizer: OptimizerCallable, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Saved parameter groups with the hyper-parameters (constructor arguments) of the resuming run's optimizer.

    All other entries of a group, such as a counter of the optimizer, are state and stay as saved.
    """
    built = optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": max(rates.values())}])
    arguments = inspect.signature(type(built)).parameters.keys() - {"params"}
    values = {name: value for name, value in built.param_groups[0].items() if name in arguments}

    def updated(group: Mapping[str, Any]) -> dict[str, Any]:
        if group.get("name") not in rates:
            return dict(group)
        rate = rates[group["name"]]
        return {**group, **values, "lr": rate, "initial_lr": rate}

    return [updated(group) for group in groups]


def rate_of_full_modules(lr_lora: float, config: Any) -> float:
    """The learning rate of fully trained modules for a LoRA rate: 96 / hidden size times that rate, and at most that rate.

    A step of Adam moves each weight of a full module by about its rate, and the module's outputs by the sum over its inputs. So
    the rate must fall with the width (Yang et al., 2022, arXiv 2203.03466), but the rate of LoRA's B need not (Hayou et al.,
    2024, arXiv 2402.12354). In the study (`results/study/README.md`), policies of width 48 to 192 did best, or equally well, with
    the same rate for both; SmolLM2, of width 576, did no better with 0.3 of LoRA's rate than with a sixth.
    """
    return lr_lora * min(1.0, WIDTH_OF_ONE_RATE / config.get_text_config().hidden_size)


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes that an optimizer needs per trained parameter."""

    state: float  # kept between steps
    step: float  # extra memory during a step on an accelerator, where it updates all tensors together


def optimizer_bytes(optimizer: OptimizerCallable) -> OptimizerBytes:
    """Measure an optimizer's memory in one step.

    Raises:
        ConfigError: If the optimizer cannot take a step on a CPU.
    """
    parameter = nn.Parameter(torch.zeros(_PROBE_SHAPE))
    try:
        built = optimizer([{"params": [parameter], "lr": 0.0, "name": "full"}])
        parameter.grad = torch.ones_like(parameter)
        built.step()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"the memory of model.optimizer cannot be measured: {one_line(error)}") from error
    kept = [
        value for state in built.state.values() for value in state.values() if isinstance(value, Tensor) and value.numel() > 1
    ]
    # By default torch's own optimizers compute the denominators of all tensors at once.
    given, of_torch = built.defaults, type(built).__module__.startswith("torch.")
    one_by_one = given.get("fused") or given.get("foreach") is False or not of_torch
    state = sum(value.untyped_storage().nbytes() for value in kept) / parameter.numel()
    return OptimizerBytes(state, step=0.0 if one_by_one else 4.0)

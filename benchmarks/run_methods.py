"""Worker: one of this project's three methods, LoRA, hybrid or full fine-tuning (FFT), with what it costs in time and memory."""

from collections.abc import Iterator
from typing import Any

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from run_ours import Gated, build_policy, train
from torch import nn
from torch.optim import Optimizer
from worker import Gate, Settings

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.scorers import PreconditionedTail
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.callbacks import HybridAdapterSetup, StepTimer
from hybrid_lightning.policy.module import PolicyModule

STEP_PHASES = ("generate", "reward", "logprobs", "update")
SCORING_PHASES = ("calibration_rollouts", "calibration_gradients", "scoring")  # the last is all that is in neither of the others


class TimedCalibration:
    """Calibration losses of which the clock knows how long they and their backward passes take.

    Args:
        losses: Those of the policy.
        policy: Whose clock is told.
    """

    def __init__(self, losses: Any, policy: PolicyModule) -> None:
        self.losses, self.policy, self.info = losses, policy, losses.info

    def __len__(self) -> int:
        return len(self.losses)

    def __iter__(self) -> Iterator[torch.Tensor]:
        with self.policy.clock.phase("calibration_gradients"):
            yield from self.losses


class TimedPolicy(PolicyModule):
    """A policy whose clock tells the parts of scoring from each other."""

    def calibration_losses(self, num_prompts: int | None = None, kept: ScoringProgress | None = None) -> Any:
        """Those of the policy."""
        with self.clock.phase("calibration_rollouts"):
            losses = super().calibration_losses(num_prompts, kept)
        return TimedCalibration(losses, self)


class Accounted(Gated):
    """Reports as well what scoring took, and the bytes of the tensors that training needs beside the base model.

    Args:
        gate: Lets a step through.
        optimizer_steps: Of a rollout.
        base_bytes: Of the model as it was loaded.
        timer: Its clock has the phases.
    """

    def __init__(self, gate: Gate, optimizer_steps: int, base_bytes: int, timer: StepTimer) -> None:
        super().__init__(gate, optimizer_steps)
        self.base_bytes, self.timer = base_bytes, timer
        self.weight_bytes = self.gradient_bytes = 0

    def facts(self, policy: PolicyModule) -> dict[str, Any]:
        """Weights, scoring and the plan."""
        seconds = self.timer.clock.seconds()
        assert policy.plan is not None
        self.weight_bytes = model_bytes(policy.model)
        return {
            "base_bytes": self.base_bytes,
            "trained_weight_bytes": tensor_bytes([value for value in policy.parameters() if value.requires_grad]),
            "scoring_seconds": {name: seconds.get(name, 0.0) for name in SCORING_PHASES},
            "calibration": policy.plan.calibration,
            "full_modules": len(policy.plan.full_modules),
            "modules": len(policy.plan.candidates),
        }

    def on_before_optimizer_step(self, trainer: LightningTrainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Here the gradients are complete; after the step they are gone."""
        gradients = [value.grad for value in pl_module.parameters() if value.grad is not None]
        self.gradient_bytes = tensor_bytes(gradients)

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        """Trainable state, and seconds of the phases since the start."""
        state = [value for optimizer in trainer.optimizers for values in optimizer.state.values() for value in values.values()]
        seconds = self.timer.clock.seconds()
        return {
            "state_bytes": {
                "extra_weights": self.weight_bytes - self.base_bytes,
                "gradients": self.gradient_bytes,
                "optimizer": tensor_bytes([value for value in state if isinstance(value, torch.Tensor)]),
            },
            "phase_seconds_since_start": {name: seconds.get(name, 0.0) for name in STEP_PHASES},
        }


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """What the tensors hold, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def model_bytes(model: nn.Module) -> int:
    """What all parameters and buffers of a model hold."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def build_adapter(method: str, rank: int, alpha: int) -> HybridAdapterSetup:
    """The method as a budget; nothing but the budget and the start weights differs."""
    if method == "lora":
        return HybridAdapterSetup(budget=ModuleBudget(share=0.0), rank=rank, alpha=alpha)
    if method == "hybrid":
        return HybridAdapterSetup(budget=ModuleBudget(share=0.1), scorer=PreconditionedTail(), rank=rank, alpha=alpha)
    assert method == "fft"
    # The float32 weights take the place of the bfloat16 ones, as in any full fine-tuning without a KL term.
    return HybridAdapterSetup(budget=ModuleBudget(share=1.0), rank=rank, alpha=alpha, keep_start_weights=False)


def main() -> None:
    """Train until the parent wants no more steps."""
    settings = Settings.from_arguments()
    workload = settings.workload
    torch.set_num_threads(settings.threads)
    gate = Gate(settings.device)
    policy = build_policy(settings, TimedPolicy)
    timer = StepTimer()
    adapter = build_adapter(settings.side, workload.rank, workload.alpha)
    accounted = Accounted(gate, workload.minibatches, model_bytes(policy.model), timer)
    train(settings, policy, [timer, adapter, accounted])


if __name__ == "__main__":
    main()

"""Worker: one of this project's three methods, LoRA, hybrid or full fine-tuning (FFT), with its cost in time and memory."""

from typing import Any

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from torch.optim import Optimizer

from benchmarks.training import Gated, build_adapter, build_policy, gradient_bytes, optimizer_bytes, tensor_bytes, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings
from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.training.policy_module import PolicyModule


class Accounted(Gated):
    """Also reports the cost of scoring, and the bytes of the tensors that training needs besides the base model."""

    def __init__(self, gate: Gate, base_bytes: int, timer: StepTimer) -> None:
        super().__init__(gate)
        self.base_bytes, self.timer = base_bytes, timer
        self.weight_bytes = self.gradient_bytes = 0

    def facts(self, policy: PolicyModule) -> dict[str, Any]:
        assert policy.plan is not None
        self.weight_bytes = model_bytes(policy.model)
        return {
            "base_bytes": self.base_bytes,
            "trained_weight_bytes": tensor_bytes([value for value in policy.parameters() if value.requires_grad]),
            "scoring_seconds": self.timer.clock.seconds().get("scoring", 0.0),
            "calibration": policy.plan.calibration,
            "full_modules": len(policy.plan.full_modules),
            "modules": len(policy.plan.candidates),
        }

    def on_before_optimizer_step(self, trainer: LightningTrainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure now: the gradients are complete, and are freed after the step."""
        self.gradient_bytes = gradient_bytes(pl_module)

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        return {
            "state_bytes": {
                "extra_weights": self.weight_bytes - self.base_bytes,
                "gradients": self.gradient_bytes,
                "optimizer": optimizer_bytes(trainer.optimizers),
            },
        }


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def main() -> None:
    settings = Settings.from_arguments()
    gate, timer = Gate(settings), StepTimer()
    policy = build_policy(settings)
    adapter = build_adapter(settings.workload, settings.side)
    train(settings, policy, [timer, adapter, Accounted(gate, model_bytes(policy.model), timer)])


if __name__ == "__main__":
    main()

"""AdaLoRA (arXiv 2303.10512) in PEFT's implementation, as a baseline in the same training loop.

Each candidate module gets an update P diag(e) Q with an initial rank of 1.5 times the task's rank. In the first half of the run,
the least important entries of e are masked until the modules have the task's rank on average.
"""

from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from torch import Tensor

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.training.example_module import SupervisedModule
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.policy_module import PolicyModule

ORTHOGONALITY = 0.1  # weight of |P'P - 1| + |QQ' - 1|, the paper's choice on most tasks


class _AdaLoRA(LanguageModule):
    """Replaces the plan's LoRA by AdaLoRA; the plan must have only LoRA."""

    _allocated_step = 0

    def adapt(self, plan: AdapterPlan, keep_start_weights: bool = True) -> None:
        assert self.policy.base_digest == plan.model_digest and not plan.full_modules
        steps, rank = self.trainer.max_steps, plan.lora.rank
        config = AdaLoraConfig(
            target_modules=list(plan.lora_modules),
            init_r=max(rank + 1, int(1.5 * rank)),
            target_r=rank,
            lora_alpha=plan.lora.alpha,
            tinit=steps // 10,
            tfinal=steps // 2,
            total_step=steps,
            orth_reg_weight=ORTHOGONALITY,
        )
        self.policy.set_model(get_peft_model(self.policy.model, config))
        self.policy.plan = plan

    def training_step(self, *arguments: Any) -> Tensor:
        """The loss, and PEFT's regularisation, which it adds only to losses that the model itself computes."""
        loss: Tensor = super().training_step(*arguments)
        return loss + ORTHOGONALITY * distance_from_orthogonal(self.policy.model)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Mask the least important entries after each optimizer step, while its gradient still exists."""
        super().on_train_batch_end(*arguments)
        layers: AdaLoraModel = self.policy.model.base_model
        if self.trainer.global_step > self._allocated_step:
            self._allocated_step = self.trainer.global_step
            layers.update_and_allocate(self._allocated_step)


class AdaLoRAPolicy(_AdaLoRA, PolicyModule):
    """`PolicyModule` with AdaLoRA; arguments are the same."""


class AdaLoRASupervised(_AdaLoRA, SupervisedModule):
    """`SupervisedModule` with AdaLoRA; arguments are the same."""


def distance_from_orthogonal(model: PeftModel) -> Tensor:
    """Mean Frobenius distance of the matrices P and Q of all modules from orthogonal ones."""
    distances = []
    for name, parameter in model.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            square = parameter @ parameter.T if ".lora_A" in name else parameter.T @ parameter
            distances.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device)))
    return torch.stack(distances).mean()

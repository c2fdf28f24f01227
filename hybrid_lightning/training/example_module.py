"""Modules that train on completions in the data with `ExampleTask`: supervised fine-tuning, and DPO."""

from typing import Any

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import DPOLoss, ExampleLoss, SupervisedLoss
from hybrid_lightning.rewards.combined import AnyReward
from hybrid_lightning.training.engine_generation import generation_of
from hybrid_lightning.training.example_task import ExampleTask
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.options import TaskParts

__all__ = ["ExampleModule", "PreferenceModule", "SupervisedModule"]


class ExampleModule(LanguageModule):
    """Trains and evaluates with a loss on examples, which may be your own.

    Args:
        loss: Loss on examples; None for the class's own loss, if it has one.
        reward: Scores completions of held-out prompts, which validation and test then also generate; None to evaluate only the
            loss.
        examples_per_step: Examples (pairs, for a loss on pairs) in an optimizer step, over all devices and micro-batches.
        options: Options of `LanguageModule`.

    Raises:
        ConfigError: If a value is invalid, or no loss is given.
        ModelError: If the model cannot be found.
    """

    default_loss: type[ExampleLoss] | None = None
    task: ExampleTask

    def __init__(
        self,
        loss: ExampleLoss | None = None,
        reward: AnyReward | None = None,
        *,
        examples_per_step: int = 32,
        **options: Any,
    ) -> None:
        trained_by = self.default_loss() if loss is None and self.default_loss is not None else loss
        if trained_by is None:
            raise ConfigError("ExampleModule needs model.loss; set it, or use SupervisedModule or PreferenceModule")

        def make_task(parts: TaskParts) -> ExampleTask:
            generation = generation_of(parts.policy, parts.sampler, reward, parts.run, parts.seed)
            return ExampleTask(trained_by, examples_per_step, generation, parts.max_tokens, parts.eval_samples, parts.seed)

        super().__init__(make_task, **options)


class SupervisedModule(ExampleModule):
    """Supervised fine-tuning, on completions only.

    Use a `PromptDataModule` with a `DemonstrationFormat`. All weights are frozen when the model is loaded; `HybridAdapterSetup`
    scores the modules by the gradient of the supervised loss, and makes some weights trainable. The trained model can be
    exported, and a `PolicyModule` can start from the export.

    See `ExampleModule` for arguments and errors.
    """

    default_loss = SupervisedLoss


class PreferenceModule(ExampleModule):
    """Preference alignment by a loss on pairs, such as DPO.

    Use a `PromptDataModule` with a `PreferenceFormat`. The chosen and the rejected completion share the forward and backward pass
    of their prompt. The loss compares with the start policy, which is the same model with its adapter switched off, so no second
    model is needed. `HybridAdapterSetup` scores the modules by the gradient of the loss at the start policy.

    See `ExampleModule` for arguments and errors.
    """

    default_loss = DPOLoss

"""`SupervisedModule`: a causal language model that is trained to say what the data says."""

from hybrid_lightning.losses import SupervisedLoss
from hybrid_lightning.policy.examples import ExampleModule

__all__ = ["SupervisedModule"]


class SupervisedModule(ExampleModule):
    """Supervised fine-tuning, on completions only.

    Data is a `PromptDataModule` whose format is a `DemonstrationFormat`. The model is frozen as loaded; `HybridAdapterSetup`
    makes part of it trainable, scored by the gradient of the supervised loss. What comes out can be exported and be the start
    policy of a `PolicyModule`.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = SupervisedLoss
    completions_wanted = "one: give data.format=DemonstrationFormat"
    shown_metrics = ("loss",)

"""`PreferenceModule`: a causal language model that is trained to say the one thing rather than the other."""

from hybrid_lightning.losses import DPOLoss
from hybrid_lightning.policy.examples import ExampleModule

__all__ = ["PreferenceModule"]


class PreferenceModule(ExampleModule):
    """Preference alignment by a loss of pairs, such as DPO.

    Data is a `PromptDataModule` whose format is a `PreferenceFormat`; chosen and rejected completion share their prompt's forward
    and backward pass. The start policy, with which the loss compares, is the model with its adapter switched off: there is no
    second one. `HybridAdapterSetup` scores the modules by the gradient of the loss at the start policy.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = DPOLoss
    completions_wanted = "two, the chosen and the rejected one: give data.format=PreferenceFormat"
    shown_metrics = ("loss", "rewards/accuracies")

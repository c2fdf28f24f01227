"""`ExportForm`: what a policy is exported as; one class for each form, named on the command line by `--form`."""

from abc import ABC, abstractmethod
from pathlib import Path

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.export.trained import TrainedPolicy
from hybrid_lightning.parts import Part


class ExportForm(Part, ABC):
    """Writes a policy into a folder.

    A form of one's own implements `write` and `how_to_load`.
    """

    name: str  # of the folder in a run folder
    library: str  # `library_name` and
    relation: str  # `base_model_relation` of the model card

    def check(self, plan: AdapterPlan) -> None:
        """Make sure that the form can hold what a plan trains; most can. Called before training where the plan is known.

        Raises:
            ConfigError: If it cannot.
        """

    def weights_dtype(self, policy: TrainedPolicy) -> str | None:
        """Dtype of the weights that it writes, for the screen and the model card; None says nothing of it."""
        return None

    @abstractmethod
    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write weights, configs and tokenizer; the model card and the plan are written by the caller.

        Args:
            policy: To write.
            folder: Empty.
        """

    @abstractmethod
    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Python code for the model card that loads the policy, run with this folder as the working directory."""

"""`PolicyExport`: exports the policy of a running job as a folder that plain PEFT or transformers can load."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.planning import applied_plan
from hybrid_lightning.callbacks.run_folder import find_callback, run_folder
from hybrid_lightning.callbacks.run_summary import RunSummary
from hybrid_lightning.callbacks.step_timer import time_charged_to
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.merged_model import MergedModel
from hybrid_lightning.export.push import open_repository, push_folder
from hybrid_lightning.export.sources import policy_of_module
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy
from hybrid_lightning.export.write import write_policy, written_message


class PolicyExport(Callback):
    """Exports the policy at the end of training, and optionally every n steps, each time into a folder `step=N`.

    An export does not change the training; its time counts as checkpoint time. The callback must come after `RunSummary`, so that
    the model card has the last validation.

    Args:
        form: What to write; None takes `MergedModel()`, which reads the base model again, into the memory of the CPU.
        folder: Folder for the folders `step=N`; None takes `export/FORM` in the run folder.
        every_n_steps: Optimizer steps between exports; None for one export at the end.
        push_to: Repository on the Hugging Face hub, such as `me/my-model`; each export is pushed to it as a commit that replaces
            the one before. A new repository is private. The token comes from HF_TOKEN or `hf auth login`. A run that cannot push
            is refused before it begins; a push that fails later is a warning.

    Raises:
        ConfigError: If `every_n_steps` is below 1.
    """

    def __init__(
        self,
        form: ExportForm | None = None,
        folder: str | None = None,
        every_n_steps: int | None = None,
        push_to: str | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"PolicyExport: every_n_steps must be at least 1, got {every_n_steps}; null exports at the end only"
            )
        self.form = form or MergedModel()
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.push_to = push_to
        self._repository: str | None = None  # the name of `push_to` with its owner, set after pushing was found possible
        self._exported_step = -1

    def open_repository(self) -> None:
        """Make sure, once, that exports can be pushed; ConfigError if they cannot."""
        if self.push_to is not None and self._repository is None:
            self._repository = open_repository(self.push_to)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what could not be exported: a plan that the form cannot hold, another run's folder."""
        plan = applied_plan(pl_module)
        if plan is None:
            raise ConfigError("PolicyExport has nothing to export; give HybridAdapterSetup among trainer.callbacks")
        self.form.check(plan)
        if self._folder(trainer) is not None and trainer.is_global_zero:
            self.open_repository()
        self._exported_step = trainer.global_step
        folder = self._folder(trainer)
        found = folder.glob("step=*") if folder is not None else ()
        latest = max((int(path.name[5:]) for path in found if path.name[5:].isdigit()), default=0)
        if latest > trainer.global_step:
            raise ConfigError(
                f"PolicyExport: {folder} has an export of step {latest} of another run, and this one begins after step "
                f"{trainer.global_step}; give another folder, or remove it"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Export after every n optimizer steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the policy at the end of training."""
        self._export(trainer, pl_module)

    def _folder(self, trainer: Trainer) -> Path | None:
        """The folder of exports; None under `fast_dev_run`, which writes nothing."""
        root = run_folder(trainer)
        own = Path(self.folder) if self.folder is not None else None
        return root and (own or root / "export" / self.form.name)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export each step once."""
        folder = self._folder(trainer)
        if folder is None or trainer.global_step <= self._exported_step:
            return
        self._exported_step = trainer.global_step
        with time_charged_to(trainer, "checkpoint"):
            policy = policy_in_training(trainer, pl_module)
            if policy is not None:
                target = write_policy(policy, self.form, folder / f"step={trainer.global_step}")
                say(written_message(policy, self.form, target))
                if self._repository is not None:
                    try:
                        say(f"Pushed to {push_folder(target, self._repository, f'Step {trainer.global_step}')}")
                    except ConfigError as error:  # training continues
                        rank_zero_warn(str(error))
            trainer.strategy.barrier("PolicyExport")


def policy_in_training(trainer: Trainer, pl_module: LightningModule) -> TrainedPolicy | None:
    """The policy in its current state; None on processes that do not write it. Every process must call this."""
    summary = find_callback(trainer, RunSummary)
    return policy_of_module(
        pl_module,
        steps=trainer.global_step,
        summary=None if summary is None else summary.state_dict(),
        datamodule=trainer.datamodule,  # type: ignore[attr-defined]
        keep=trainer.is_global_zero,
    )

"""`PolicyExport`: the policy of a running job as a folder that plain PEFT or transformers loads."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.callbacks.run_summary import RunSummary
from hybrid_lightning.callbacks.step_timer import measured
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.merged_model import MergedModel
from hybrid_lightning.export.sources import policy_of_module
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy
from hybrid_lightning.export.write import write_policy, written_message


class PolicyExport(Callback):
    """Exports at the end of training, and every so many steps if asked to, each into a folder `step=N`.

    Training goes on as it would have without; its time counts as that of a checkpoint. Stands after `RunSummary`, so that the
    model card has the last validation.

    Args:
        form: What to write; None takes `MergedModel()`, which reads the base model anew, into memory of the CPU.
        folder: Where the folders `step=N` go; None takes `export/FORM` in the run folder.
        every_n_steps: Optimizer steps between exports; None for one at the end.

    Raises:
        ConfigError: If `every_n_steps` is below 1.
    """

    def __init__(self, form: ExportForm | None = None, folder: str | None = None, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"PolicyExport: every_n_steps must be at least 1, got {every_n_steps}; null exports at the end only"
            )
        self.form = form or MergedModel()
        self.folder = folder
        self.every_n_steps = every_n_steps
        self._exported_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the run folder made."""
        if stage == "fit":
            run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training what could not be exported after it.

        Raises:
            ConfigError: If the form cannot hold the plan, the folder has exports of steps that are still to come, or the strategy
                is FSDP1.
        """
        plan = getattr(pl_module, "plan", None)
        if plan is None:
            raise ConfigError("PolicyExport has nothing to export: it needs HybridAdapterSetup among trainer.callbacks")
        self.form.check(plan)
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigError(
                "PolicyExport cannot put together the shards of FSDP1 while it trains; use configs/strategy/fsdp2.yaml, or the "
                "export command on a checkpoint of the run"
            )
        self._exported_step = trainer.global_step
        folder = self._folder(trainer)
        if folder is None or not folder.is_dir():
            return
        steps = [int(path.name[5:]) for path in folder.glob("step=*") if path.name[5:].isdigit()]
        if any(step > trainer.global_step for step in steps):
            raise ConfigError(
                f"PolicyExport: {folder} has an export of step {max(steps)} of another run, and this one begins after step "
                f"{trainer.global_step}; give another folder, or remove it"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Export after every n optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step > self._exported_step:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what training ended with."""
        if trainer.global_step > self._exported_step:
            self._export(trainer, pl_module)

    def _folder(self, trainer: Trainer) -> Path | None:
        folder = run_folder(trainer)
        if folder is None or self.folder is None:
            return None if folder is None else folder / "export" / self.form.name
        return Path(self.folder)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exported_step = trainer.global_step
        folder = self._folder(trainer)
        if folder is None:  # a trial run leaves nothing behind
            return
        with measured(trainer, "checkpoint"):
            policy = policy_in_training(trainer, pl_module)
            if policy is not None:
                target = write_policy(policy, self.form, folder / f"step={trainer.global_step}")
                say(written_message(policy, self.form, target))
            trainer.strategy.barrier("PolicyExport")


def policy_in_training(trainer: Trainer, pl_module: LightningModule) -> TrainedPolicy | None:
    """The policy as it is now, on the process that writes it; every process must call this."""
    summaries = [callback for callback in trainer.callbacks if isinstance(callback, RunSummary)]  # type: ignore[attr-defined]
    return policy_of_module(
        pl_module,
        steps=trainer.global_step,
        summary=summaries[0].state_dict() if summaries else None,
        datamodule=trainer.datamodule,  # type: ignore[attr-defined]
        keep=trainer.is_global_zero,
    )

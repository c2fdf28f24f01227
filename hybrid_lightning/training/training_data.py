"""The training data of a policy: its prompts, its train dataloader, and what becomes of an epoch if a resume finds other data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.types import Prompt

if TYPE_CHECKING:
    from hybrid_lightning.training.language import LanguageModule


def training_prompts(trainer: Any) -> list[Prompt]:
    """The training prompts of the Trainer's data module; ConfigError if it has none."""
    prompts = getattr(trainer.datamodule, "train_prompts", None)
    if prompts is None:
        raise ConfigError(
            "modules are scored on the train_prompts of the data module, but trainer.datamodule has none; give "
            "trainer.fit(datamodule=PromptDataModule(...)), or a plan to HybridAdapterSetup"
        )
    return list(prompts)


def make_rollout_loader(policy: "LanguageModule", prompts: Sequence[Prompt]) -> RolloutLoader:
    """Make the train dataloader: rollouts of these prompts by `policy`, in the micro-batches that its Trainer asks for."""
    trainer = policy.trainer
    epoch = trainer.current_epoch
    return RolloutLoader(
        prompts,
        policy,
        policy.rollout_schedule,
        policy.run_state,
        generator=torch.Generator().manual_seed(policy.seed * 100_003 + 1_000_000_007 * epoch),
        seed=policy.seed,
        epoch=epoch,
        shuffle=trainer.overfit_batches == 0,  # type: ignore[attr-defined]
    )


def restart_epoch(trainer: Trainer) -> None:
    """Let a resumed run count the micro-batches of its epoch from 0, where an epoch has another number of them than before.

    With the old count the epoch would end, or an optimizer step be made, in the middle of a step's micro-batches. Counts over all
    epochs stay. To be called between Lightning's `setup_data` and the first micro-batch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total, current = cast("_ProcessedTracker", progress.total), cast("_ProcessedTracker", progress.current)
    count = int(trainer.num_training_batches) if progress.is_last_batch else 0  # an epoch that is over stays so
    current.ready = current.started = current.processed = count
    # A checkpoint that is saved in the last hook of a micro-batch does not count it as completed; Lightning then adds it.
    current.completed = count - (total.processed - total.completed)

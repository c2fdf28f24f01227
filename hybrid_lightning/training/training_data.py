"""The training data of a policy: its prompts, its train dataloader, and an epoch that begins anew at a resume."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.sharding.ranks import gather_objects, sum_over_ranks
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
        accumulate_grad_batches=lambda: trainer.accumulate_grad_batches,
        generator=torch.Generator().manual_seed(policy.seed * 100_003 + 1_000_000_007 * epoch),
        device=policy.device,
        seed=policy.seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        sum_over_ranks=sum_over_ranks,
        gather_over_ranks=gather_objects,
        epoch=epoch,
        shuffle=trainer.overfit_batches == 0,  # type: ignore[attr-defined]
        on_given_up=lambda: restart_epoch(trainer),
        steps_left=lambda: trainer.estimated_stepping_batches - trainer.global_step,
    )


def restart_epoch(trainer: Trainer) -> None:
    """Let a resumed run count the micro-batches of its epoch from 0, while Lightning loads the state of the train dataloader.

    With the old count the epoch would end, or an optimizer step be made, in the middle of a step's micro-batches, where there is
    now another number of them. Counts over all epochs stay.
    """
    loop = trainer.fit_loop
    progress, loader = loop.epoch_loop.batch_progress, loop._combined_loader
    total, current = cast("_ProcessedTracker", progress.total), cast("_ProcessedTracker", progress.current)
    assert loader is not None and loader.limits is not None
    count = int(loader.limits[0]) if progress.is_last_batch else 0  # an epoch that is over stays so
    current.ready = current.started = current.processed = count
    # A checkpoint that is saved in the last hook of a micro-batch does not count it as completed; Lightning then adds it.
    current.completed = count - (total.processed - total.completed)

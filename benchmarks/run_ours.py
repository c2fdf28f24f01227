"""Worker: hybrid_lightning, as its README says to use it from Python."""

import tempfile
from typing import Any

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import torch
from lightning import LightningDataModule
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from reward import hashed_reward
from worker import Gate, Settings
from workloads import Workload

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.losses import GRPOLoss, GSPOLoss
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.types import Prompt


class HashedReward(RewardFunction):
    """The shared reward."""

    measures_correctness = False

    def __call__(self, completions: Any, prompts: Any) -> list[float]:
        """Args: texts of the completions, and the prompt of each."""
        return hashed_reward(completions)


class GivenPrompts(LightningDataModule):
    """Prompts in the given order."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.train_prompts = [Prompt(text=text, index=index) for index, text in enumerate(texts)]

    def train_dataloader(self) -> RolloutLoader:
        """Rollouts, in the order of the prompts, as the other side has them."""
        assert self.trainer is not None
        policy = self.trainer.lightning_module
        assert isinstance(policy, PolicyModule)
        loader = policy.rollout_loader(self.train_prompts)
        loader.shuffle = False
        return loader


class Gated(Callback):
    """Lets one rollout and all its optimizer steps through at a time."""

    def __init__(self, gate: Gate, optimizer_steps: int) -> None:
        self.gate, self.optimizer_steps = gate, optimizer_steps

    def on_train_epoch_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Before the first rollout: say what is trained, and wait."""
        assert isinstance(pl_module, PolicyModule)
        prompts = trainer.datamodule.train_prompts  # type: ignore[attr-defined]
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        self.gate.ready([pl_module.encode(prompt) for prompt in prompts], trained, settings={}, **self.facts(pl_module))
        trainer.should_stop = not self.gate.wait()

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        """After the last micro-batch of a rollout: report, and wait for the next. The wait is all that is not timed."""
        assert isinstance(pl_module, PolicyModule)
        loader = trainer.train_dataloader
        assert isinstance(loader, RolloutLoader)
        if (trainer.fit_loop.batch_idx + 1) % loader.micro_batches_per_rollout == 0:
            assert pl_module.last_rollout is not None
            lengths = pl_module.last_rollout[0].sequences.completion_mask.sum(dim=1)
            self.gate.done(lengths.tolist(), trainer.global_step, **self.details(trainer))
            trainer.should_stop = not self.gate.wait()

    def facts(self, policy: PolicyModule) -> dict[str, Any]:
        """What else is said before the first step."""
        return {}

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        """What else is said of a step."""
        return {}


def build_policy(settings: Settings, policy: type[PolicyModule] = PolicyModule) -> PolicyModule:
    """The workload as a policy."""
    workload: Workload = settings.workload
    loss = GSPOLoss if workload.sequence_ratio else GRPOLoss
    return policy(
        loss=loss(clip_low=workload.clip_low, clip_high=workload.clip_high),
        reward=HashedReward(),
        model=str(settings.folder),
        dtype=workload.dtype,
        sampler=Sampler(max_new_tokens=workload.max_new_tokens),
        prompts_per_rollout=workload.prompts,
        samples_per_prompt=workload.samples,
        minibatches_per_rollout=workload.minibatches,
        lr_lora=workload.learning_rate,
        seed=settings.seed,
    )


def train(settings: Settings, policy: PolicyModule, callbacks: list[Callback]) -> None:
    """Train until the parent wants no more steps."""
    workload: Workload = settings.workload
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if settings.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if workload.dtype == "bfloat16" else "32-true",
            max_steps=settings.rollouts * workload.minibatches,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(policy, datamodule=GivenPrompts(settings.prompts))


def main() -> None:
    """LoRA, as TRL and PEFT have it."""
    settings = Settings.from_arguments()
    workload: Workload = settings.workload
    torch.set_num_threads(settings.threads)
    gate = Gate(settings.device)
    adapter = HybridAdapterSetup(budget=ModuleBudget(share=0.0), rank=workload.rank, alpha=workload.alpha)
    train(settings, build_policy(settings), [adapter, Gated(gate, workload.minibatches)])


if __name__ == "__main__":
    main()

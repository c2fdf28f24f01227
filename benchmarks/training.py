"""This project's side of a comparison: a policy, a run and its measurements, using the package from Python as in README.

A worker prepares its process, as `python -m hybrid_lightning` does, before it imports this.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.worker import Gate
from benchmarks.workloads import ANSWER, Settings, Workload, hashed_reward
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.environments import Environment, EpisodeLimits, Step
from hybrid_lightning.losses import GRPOLoss, GSPOLoss
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.interface import Stops
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.types import Message, Prompt


class HashedReward(RewardFunction):
    """The reward of all sides, which gives every row an advantage."""

    measures_correctness = False

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        return hashed_reward(completions)


class GivenPrompts(LightningDataModule):
    """Training prompts; the first `validated` prompts are also the only batch of a validation."""

    def __init__(self, texts: Sequence[str], validated: int = 1) -> None:
        super().__init__()
        self.train_prompts = [Prompt(text=text, index=index) for index, text in enumerate(texts)]
        self.validated = validated

    def train_dataloader(self) -> RolloutLoader:
        assert self.trainer is not None
        policy = self.trainer.lightning_module
        assert isinstance(policy, PolicyModule)
        return policy.rollout_loader(self.train_prompts)

    def val_dataloader(self) -> Any:
        prompts: Any = self.train_prompts[: self.validated]
        return DataLoader(prompts, batch_size=self.validated, collate_fn=list)


class Gated(Callback):
    """Lets one rollout and all its optimizer steps through at a time."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_epoch_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Before the first rollout, report what is trained, and wait."""
        assert isinstance(pl_module, PolicyModule)
        prompts = trainer.datamodule.train_prompts  # type: ignore[attr-defined]
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        self.gate.ready([pl_module.task.generation.encode(prompt) for prompt in prompts], trained, **self.facts(pl_module))
        trainer.should_stop = not self.gate.wait()

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last micro-batch of a rollout, report and wait for the next rollout. Only this wait is not timed."""
        assert isinstance(pl_module, PolicyModule)
        loader = trainer.train_dataloader
        assert isinstance(loader, RolloutLoader)
        if (trainer.fit_loop.batch_idx + 1) % loader.micro_batches_per_rollout == 0:
            self.gate.done(batch.rollout.lengths.flatten().tolist(), trainer.global_step, **self.details(trainer))
            trainer.should_stop = not self.gate.wait()

    def facts(self, policy: PolicyModule) -> dict[str, Any]:
        """Further facts to report before the first step."""
        return {}

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        """Further details to report about a step."""
        return {}


class Differences(Callback):
    """Records how much log-probabilities of sampling and training differ, in nats, for every training token."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare under the weights that sampled: before a rollout's optimizer steps, or with the loader's values from then."""
        assert isinstance(pl_module, PolicyModule)
        trained = batch.old_logprobs
        if trained is None:  # the policy is still the one that sampled
            with torch.no_grad(), pl_module.policy.precision():
                trained, _ = pl_module.task.passes.logprobs(batch.sequences)
        self.found.append((trained - batch.sampling_logprobs)[batch.sequences.sampled_mask].abs())


class Answers(Environment):
    """A tool that answers every message at once."""

    thread_safe = True

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        return ()

    def step(self, message: Message) -> Step:
        return Step([{"role": "tool", "content": ANSWER}])


class WholeTurns(Sampler):
    """Messages end by themselves at `max_new_tokens`, so that their episodes continue."""

    def stops(self, tokenizer: Any, ids: Sequence[int] | None = None) -> Stops:
        return Stops((-1,), lambda tokens, _: torch.full((len(tokens),), tokens.shape[1] == self.max_new_tokens))  # type: ignore


def build_policy(settings: Settings, sampler: Any = None, loss: Any = None, **options: Any) -> PolicyModule:
    workload = settings.workload
    if workload.turns > 1:
        sampler = WholeTurns(workload.max_new_tokens)
        options |= {"environment": Answers(), "episodes": EpisodeLimits(workload.turns, workload.episode_tokens)}
        options["turn_template"] = "{content}"
    kind = GSPOLoss if workload.sequence_ratio else GRPOLoss
    return PolicyModule(
        loss=loss or kind(clip_low=workload.clip_low, clip_high=workload.clip_high),
        reward=HashedReward(),
        model=str(settings.folder),
        dtype=workload.dtype,
        sampler=sampler or Sampler(max_new_tokens=workload.max_new_tokens),
        prompts_per_rollout=workload.prompts,
        samples_per_prompt=workload.samples,
        minibatches_per_rollout=workload.minibatches,
        lr_lora=workload.learning_rate,
        seed=settings.seed,
        **options,
    )


def build_adapter(workload: Workload, method: str = "lora") -> HybridAdapterSetup:
    """The adapter of a method; methods differ only in the budget and in keeping the start weights."""
    budget = ModuleBudget({"lora": 0.0, "hybrid": 0.1, "fft": 1.0}[method])
    # FFT's float32 weights take the place of the bfloat16 ones, as in any full fine-tuning without a KL term.
    return HybridAdapterSetup(budget, rank=workload.rank, alpha=workload.alpha, keep_start_weights=method != "fft")


def quiet_trainer(folder: str | Path, device: str = "cpu", **flags: Any) -> Trainer:
    """A Trainer that logs, saves, shows and validates nothing, unless flags enable it."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 1}
    quiet |= {"enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    return Trainer(accelerator="gpu" if device == "cuda" else "cpu", **{**quiet, **flags})


def train(settings: Settings, policy: PolicyModule, callbacks: list[Callback], checkpoint: Any = None, **flags: Any) -> Trainer:
    """Train until the parent wants no more steps."""
    workload = settings.workload
    flags = {"precision": "bf16-mixed" if workload.dtype == "bfloat16" else "32-true", "gradient_clip_val": 1.0, **flags}
    with TemporaryDirectory() as folder:
        steps = settings.rollouts * workload.minibatches
        trainer = quiet_trainer(folder, settings.device, max_steps=steps, callbacks=callbacks, **flags)
        trainer.fit(policy, datamodule=GivenPrompts(settings.prompts), ckpt_path=checkpoint)
    return trainer


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this process holds of these tensors, each storage counted once."""
    local = [value._local_tensor if isinstance(value, DTensor) else value for value in tensors if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values())


def gradient_bytes(module: torch.nn.Module) -> int:
    return tensor_bytes(parameter.grad for parameter in module.parameters())


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    return tensor_bytes(value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())

"""`LanguageModule`: Lightning's hooks. The tasks know neither a LightningModule nor a Trainer.

    LanguageModule <- PolicyModule                        RLLoop: its own rollouts and their rewards
                   <- ExampleModule <- SupervisedModule   ExampleTask: completions in the data
                                    <- PreferenceModule   pairs of completions, one preferred

`policy`, a `Policy`, is the model to train; `task`, a `Task`, defines how to train it. The task knows the Trainer only through
its `Run`. The modules build both from options with flat names (`policy_module.py`, `example_module.py`), and use them to
implement Lightning's hooks.
"""

from abc import ABC, abstractmethod
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.agents.agent import as_agent
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.errors import ConfigError, HybridLightningError
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.model.precision import autocast_of, check_precision
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization, check_quantization
from hybrid_lightning.process import prepare_gpu
from hybrid_lightning.rewards.combined import as_reward
from hybrid_lightning.rollout.interface import Draws
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.sharding.checkpoints import write_whole_files
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.parameters import trained_names
from hybrid_lightning.shared.configurable import Configurable, describe_arguments
from hybrid_lightning.training.calibration import CalibrationLosses
from hybrid_lightning.training.checkpoint import (
    CHECKPOINT_KEY,
    adapter_state,
    as_one_file,
    check_weights,
    restore_policy,
    save_policy,
    without_reward,
)
from hybrid_lightning.training.evaluation import Evaluation
from hybrid_lightning.training.lightning_internals import drop_train_loader
from hybrid_lightning.training.lightning_run import LightningRun
from hybrid_lightning.training.optim import (
    ConstantSchedule,
    LearningRateSchedule,
    Optimization,
    OptimizerCallable,
    with_hyper_parameters,
)
from hybrid_lightning.training.options import TaskParts
from hybrid_lightning.training.task import Task
from hybrid_lightning.types import PolicyBatch, Prompt, Rollout

__all__ = ["LanguageModule"]


class LanguageModule(Configurable, LightningModule, ABC):
    """A language model under Lightning, for any kind of training data.

    The model is loaded on first use, with all weights frozen; `HybridAdapterSetup` makes some of them trainable.

    Args:
        make_task: Makes the task; a subclass's constructor gives it.
        model: The model to train: `embedded`, a folder (also one with only an adapter), a GGUF file, `package:NAME/FILE`, or a
            hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Dtype of the weights: `float32`, `bfloat16` together with `trainer.precision=bf16-mixed`, or `float16` with
            `16-mixed`.
        attn_implementation: Attention, such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Whether to recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None for the tokenizer's template. `keep_history` is the tokenizer's
            template, but keeps every assistant turn unchanged, thoughts included.
        chat_template_kwargs: Variables of the chat template.
        sampler: Makes completions, and has the decoding parameters: `Sampler`, `VLLMSampler`, `VLLMServerSampler`; None for
            `Sampler()`.
        eval_samples: Sampled completions per prompt in validation, test and predict (the n of avg@n), besides the greedy one.
        max_tokens_per_micro_batch: Most tokens of prompts and completions in one forward and backward pass; a prompt counts once
            for all its completions. A smaller number needs less memory for activations and gives the same gradient. None for a
            number that fits the size of the model (see `default_token_budget`).
        seed: Seed of the order of the data, of sampling and of evaluation. Without `seed_everything`, a script's LoRA weights,
            dropout and scoring follow it, too.
        quantization: Quantizes the frozen base after the modules are scored, such as `NF4()`; None for no quantization.
        optimizer: Class of the optimizer, or a function that makes it from the parameter groups.
        lr_full: Learning rate of fully trained modules; None for `lr_lora` times 96 / hidden size, at most `lr_lora`.
        lr_lora: Learning rate of LoRA weights.
        schedule: Learning rate schedule; None for `ConstantSchedule()`.

    Attributes:
        policy: The model with its runner and tokenizer.
        task: The kind of training, with its data and loss.
        run: The run that the module is part of, as the task sees it.
        optimization: Optimizer, rates and schedule.

    Raises:
        ConfigError: If a value is invalid.
        ModelError: If the model cannot be found.
    """

    adapter_attribute = "model"  # see `Adaptable`
    task: Task
    evaluation: Evaluation  # the task's; a part of this module, since its metrics move to the device

    @abstractmethod
    def __init__(
        self,
        make_task: Callable[[TaskParts], Task],
        *,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        sampler: RolloutEngine | None = None,
        eval_samples: int = 8,
        max_tokens_per_micro_batch: int | None = None,
        seed: int = 0,
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float | None = None,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="make_task")
        if "_instantiator" not in self.hparams:  # made in Python; on the command line, the CLI saves its config instead
            given = dict(self.hparams)
            if given.get("reward") is not None:
                given["reward"] = as_reward(given["reward"])
            if given.get("agent") is not None:
                given["agent"] = as_agent(given["agent"])
            plain = describe_arguments(given)
            plain["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
            self._set_hparams(plain)
            self._hparams_initial = self._to_hparams_dict(plain)
        self.optimization = Optimization(optimizer, lr_full, lr_lora, schedule or ConstantSchedule())
        pretrained = Pretrained(model, revision, dtype, attn_implementation, chat_template, chat_template_kwargs)
        self.policy = Policy(pretrained, quantization, gradient_checkpointing, self._precision, partial(setattr, self, "model"))
        self.run = LightningRun(self)
        # Checkpoints do not have the frozen base; `load_state_dict` checks that all trainable weights are there.
        self.strict_loading = False
        self._checked: tuple[Any, ...] = ()  # identifies the run with checked settings, until setup has ended
        parts = TaskParts(self.policy, self.run, sampler or Sampler(), eval_samples, max_tokens_per_micro_batch, seed)
        self.task = make_task(parts)
        self.evaluation = self.task.evaluation

    # ---- the policy

    def _precision(self) -> Any:
        """A context with the Trainer's precision or, without a Trainer, the precision of the model's dtype."""
        trainer = self._trainer
        return autocast_of(self.policy.model) if trainer is None else trainer.precision_plugin.forward_context()

    @property
    def model(self) -> nn.Module:
        """The language model, adapted or not."""
        return self.policy.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.policy.pretrained.tokenizer

    @property
    def plan(self) -> AdapterPlan | None:
        """The plan of the adapted model; None before it is adapted."""
        return self.policy.plan

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the parameter groups, `full` and `lora`."""
        return self.optimization.rates(self.policy.model)

    def adapt(self, plan: AdapterPlan, keep_start_weights: bool = True) -> None:
        """Apply a plan (see `Policy.adapt`)."""
        self.policy.adapt(plan, keep_start_weights, self.run.device)

    def generate(
        self, prompts: Sequence[Prompt], samples_per_prompt: int = 1, draws: Draws = None, greedy: bool = False
    ) -> Rollout:
        """Complete prompts with the current policy (see `Generation.generate`)."""
        return self.task.generation.generate(prompts, samples_per_prompt, draws, greedy)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt (see `Generation.encode`)."""
        return self.task.generation.encode(prompt)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that these prompts can be trained on or scored (see `Task.check_prompts`). Data modules call it."""
        self.task.check_prompts(prompts)

    def calibration_losses(self, num_prompts: int | None = None) -> CalibrationLosses:
        """Losses of the start policy on training prompts of the Trainer's data module; their mean gradient scores the modules.

        `num_prompts=None` uses the number of prompts in one optimizer step or rollout.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = getattr(data, "train_prompts", None)
        if prompts is None and data is not None:
            prompts = getattr(data.train_dataloader(), "prompts", None)
        if prompts is None:
            raise ConfigError(f"scoring the modules needs training prompts, but trainer.datamodule has none; {_OWN_DATA}")
        return self.task.calibration_losses(list(prompts), num_prompts)

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: rollouts of these prompts. A data module's `train_dataloader` returns it."""
        overfits: float = self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self.task.loader(prompts, self.trainer.current_epoch, shuffle=overfits == 0)

    # ---- setup

    def setup(self, stage: str) -> None:
        """Before the run starts, reject settings that cannot work. Callbacks have been set up, and have adapted the model."""
        write_whole_files(self.trainer.strategy)
        self.policy.load()
        self.check_settings()
        self._checked = ()  # the next run may be another Trainer's
        self.policy.runner.report()

    def check_settings(self) -> None:
        """Check the settings of the run once: before the modules are scored, or when this module is set up.

        The command line also calls this before the weights are loaded.

        Raises:
            ConfigError: If the settings cannot work.
        """
        run = (self.trainer, self.trainer.state.fn, self.policy.is_loaded)
        if run == self._checked:
            return
        trainer, policy, optimizer = self.trainer, self.policy, self.optimization.optimizer
        if policy.is_loaded and self.run.stage == "fit":  # the data module has been set up by now
            _check_data(trainer)
        if trainer.strategy.root_device.type == "cuda":
            prepare_gpu(own_allocator=self.task.generation.sampler.shares_device)
        check_strategy(trainer, optimizer)
        if policy.quantization is not None:
            check_quantization(policy.quantization, trainer.strategy)
        check_precision(str(trainer.precision), policy.pretrained.dtype, optimizer)
        self.task.check_run()
        self._checked = run

    def configure_model(self) -> None:
        """Let FSDP2 split the adapted model over ranks; Lightning calls this after all setup hooks."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            self.policy.shard(strategy.shard, strategy.root_device)
            self.task.prepare_passes()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Two parameter groups, `full` and `lora`, each with its learning rate."""
        built = self.optimization.of_model(self.policy.model, self.trainer.estimated_stepping_batches)
        return built  # type: ignore[return-value]

    def teardown(self, stage: str) -> None:
        """End completions in progress, and the engine that makes them."""
        self.task.generation.shut_down()

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trainable weights, key the optimizer's state by their names, and add plan, base model and passes."""
        optimizers = self.trainer.optimizers if "optimizer_states" in checkpoint else ()
        save_policy(checkpoint, self.policy, self.task.passes, self, optimizers)
        if agreed := self.task.generation.agreed:
            checkpoint[CHECKPOINT_KEY]["agreed"] = dict(agreed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply the checkpoint's plan, unless it is already applied.

        The optimizer takes its moments and counters from the checkpoint, and its hyper-parameters from this run.

        Raises:
            CheckpointError: If the checkpoint was written with a different base model or plan, or by another program.
        """
        saved, run = adapter_state(checkpoint), self.run
        restore_policy(self.policy, saved, run.stage == "fit", run.device)
        if run.device is not None:
            self.task.passes.restore(saved, run.device)
        if run.stage == "fit":
            self.policy.runner.continues(saved.get("passes", {}))
            self.task.generation.agreed.update(saved.get("agreed", {}))
            for state in checkpoint.get("optimizer_states", []):
                state["param_groups"] = with_hyper_parameters(state["param_groups"], self.optimization.optimizer, self.rates)

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **options: Any) -> Self:  # noqa: N805
        """Make a module from a checkpoint as Lightning does, and also from the folder of a sharded checkpoint.

        If the checkpoint's reward cannot be found, such as one defined in a script, and no `reward` is given, the module has no
        reward, and a warning is printed.

        Raises:
            CheckpointError: If the folder is incomplete, or the checkpoint belongs to another model.
        """
        load: Callable[..., Self] = super().load_from_checkpoint
        if callable(given := options.get("reward")) or isinstance(given, (list, tuple)):
            options["reward"] = as_reward(given)
        if options.get("agent") is not None:
            options["agent"] = as_agent(options["agent"])
        try:
            return load(as_one_file(checkpoint_path), *arguments, **options)
        except (ValueError, ArgumentError) as error:
            if isinstance(error, HybridLightningError) or "reward" in options:
                raise
            cause = error
        try:
            module = load(as_one_file(checkpoint_path), *arguments, **options, reward=None)
        except (ValueError, ArgumentError):  # the reward was not the cause
            raise cause from None
        rank_zero_warn(without_reward(cause))
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; CheckpointError if a trainable weight is missing or unexpected, whatever `strict` is."""
        missing = trained_names(self) - state_dict.keys()
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        check_weights(sorted(missing), result.unexpected_keys)
        return type(result)([], [])

    # ---- training

    def on_fit_start(self) -> None:
        """Begin an optimizer step. In a resumed run, let the loader continue from its state in the checkpoint."""
        self._step = self.task.new_step()
        # If a schedule has queried the run's number of steps, Lightning made the train dataloader before restoring the state of
        # its loops, and would not restore the loader's state. So it must make a new one.
        drop_train_loader(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move only micro-batches: the prompts of an evaluation have no tensors."""
        return batch.to(device) if isinstance(batch, PolicyBatch) else batch

    def on_train_epoch_start(self) -> None:
        """Begin the epoch with a new optimizer step, even if the last epoch ended in the middle of one."""
        self._step = self.task.new_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock's phase "update", after the callbacks' hooks of this name; `StepTimer` ends it."""
        self.run.clock.switch("update")

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch (see `OptimizerStep.micro_batch`)."""
        if not isinstance(batch, PolicyBatch):
            raise ConfigError(f"the train dataloader returned a {type(batch).__name__}, not a batch of rollouts; {_OWN_DATA}")
        with self.policy.precision():  # may differ from the Trainer's (see `Policy.precision`)
            return self._step.micro_batch(batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients, unless the step has already cleared them."""
        self._step.clear_gradients(optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each parameter group before clipping; TrainingError if one is not finite."""
        self._step.log_gradient_norms(optimizer)

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        """Give a rollout engine with its own weights the policy's current weights."""
        self.task.generation.update()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Complete and score a batch of prompts, greedily and by sampling."""
        # If training is stopped, all ranks save together; a validation by itself has nothing to save.
        with self.run.stopping_together() if self.run.stage == "fit" else nullcontext():
            self.evaluation.add("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self.task.generation.sampler.release_memory()
        self.evaluation.end("val")

    def test_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Complete and score a batch of prompts, greedily and by sampling."""
        self.evaluation.add("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        self.evaluation.end("test")

    def on_predict_epoch_start(self) -> None:
        """Give a rollout engine with its own weights the policy's current weights."""
        self.task.generation.update()
        self.evaluation.begin_predict(sum(int(count) for count in self.trainer.num_predict_batches))

    def on_predict_epoch_end(self) -> None:
        """Stay in step with ranks that have more batches."""
        self.evaluation.end_predict()

    def predict_step(self, batch: Sequence[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of a batch of prompts, greedy and sampled, with their rewards, as records for JSON."""
        return self.evaluation.predict(batch)


_OWN_DATA = (
    "give trainer.fit(policy, datamodule=...) a PromptDataModule, or a LightningDataModule with `def train_dataloader(self): "
    "return self.trainer.lightning_module.rollout_loader(prompts)` and `def val_dataloader(self): return DataLoader(prompts, "
    "batch_size=32, collate_fn=list)`, for lists of Prompt(text=..., answer=..., index=...)"
)


def _check_data(trainer: Trainer) -> None:
    """Reject a user's data module with unsuitable loaders: rollouts are the training data."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or isinstance(data, PromptDataModule):
        return
    name = type(data).__name__
    if isinstance(data.train_dataloader(), DataLoader):
        raise ConfigError(f"{name}.train_dataloader returns prompts, but the policy trains on rollouts; {_OWN_DATA}")
    validation = data.val_dataloader() if trainer.enable_validation else None
    if isinstance(validation, DataLoader) and validation.collate_fn is default_collate:
        raise ConfigError(f"{name}.val_dataloader collates its batches into tensors, but prompts are not tensors; {_OWN_DATA}")

"""`LanguageModule`: a causal language model under Lightning, whatever it is trained on.

    AdaptedModule <- LanguageModule <- PolicyModule                        its own rollouts and their rewards
                                    <- ExampleModule <- SupervisedModule   completions in the data
                                                     <- PreferenceModule   pairs of them, one preferred

How an optimizer step is made; a subclass gives the methods that are marked with *:

    RolloutLoader                    the train dataloader
      roll_out *                     completions of a batch of prompts, their advantages, and which of them the update needs
      add_logprobs *                 log-probabilities of the policy before the step, and of the start policy
    training_step -> Update          cuts a micro-batch into chunks that fit into memory
      chunk_loss *                   loss of a chunk, from
        logprobs *                     the policy's log-probabilities, with gradient
    on_before_optimizer_step         gradient norms; Lightning then clips and makes the step

Validation and test are in `evaluation.py`, what makes completions is in `generation.py`, which settings of a run work in
`run_checks.py`. This file loads the model, and calls all of these from Lightning's hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.engine import Backend
from hybrid_lightning.episodes.episodes import Episodes, has_failed
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import check_set_name
from hybrid_lightning.model.precision import autocast_of, checkpoint_gradients, evaluation_mode
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.options import ACCURACY, FIXED, MADE_BY, Option
from hybrid_lightning.quiet import quiet_libraries
from hybrid_lightning.rewards import ArrivingRewards, RewardFunction, evaluate_reward, extract_answers
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import Draws
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutLoader, RolloutSchedule, TrainedRollout
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.rollout.run_state import RunState
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.sharding.ranks import check_stop, gather_counts, gather_objects, sum_over_ranks
from hybrid_lightning.stopping import StopSignals
from hybrid_lightning.training.adaptation import CHECKPOINT_KEY, AdaptedModule
from hybrid_lightning.training.calibration import CalibrationLosses
from hybrid_lightning.training.evaluation import Evaluation, predictions, repeat_prompts
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.run_checks import check_run
from hybrid_lightning.training.step_times import PhaseClock
from hybrid_lightning.training.training_data import make_rollout_loader, restart_epoch
from hybrid_lightning.training.update import Update, restore_pass_tokens, saved_pass_tokens
from hybrid_lightning.types import Completion, PolicyBatch, Prompt, Rewards, Rollouts, Sequences
from hybrid_lightning.user_code import in_user_code

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine


class LanguageModule(AdaptedModule, ABC):
    """A language model that generates, is evaluated and is trained.

    All weights are frozen when the model is loaded; `HybridAdapterSetup` makes some of them trainable.

    The reward is None where nothing is generated. The keyword arguments are those of `PolicyModule`.
    """

    shown_metrics: tuple[str, ...] = ("reward", "completions/mean_length")  # beside the progress bar
    # First part ("completions" of "completions/mean_length") of the names that training logs: here, by Lightning, by `StepTimer`.
    training_metrics = frozenset({"loss", "grad_norm", "epoch", "step", "time", "throughput"})
    rows_per_example = 1  # so many neighbouring rows are never in different chunks: 2 for the pairs of a preference loss
    OPTIONS: ClassVar[dict[str, Option]] = {
        "loss": Option(MADE_BY, scores=True),
        "reward": Option(MADE_BY | ACCURACY, scores=True),
        # Another model is refused by the digest of its weights, but the same model may have been moved.
        "model": Option(scores=True),
        "revision": Option(scores=True),
        "dtype": Option(FIXED, scores=True),
        "attn_implementation": Option(MADE_BY, scores=True),
        "gradient_checkpointing": Option(),
        "chat_template": Option(MADE_BY | ACCURACY, scores=True),
        "chat_template_kwargs": Option(MADE_BY | ACCURACY, scores=True),
        "sampler": Option(MADE_BY | ACCURACY, scores=True),
        "eval_samples": Option(ACCURACY),
        "max_tokens_per_micro_batch": Option(scores=True),  # by the rounding of sums
        "seed": Option(FIXED, scores=True),
    }
    episodes: Episodes | None = None  # plays them, where the policy acts in an environment
    _loads_later = False  # whether the constructor leaves the weights to `load`

    def __init__(
        self,
        loss: Any,
        reward: RewardFunction | None,
        rollout_schedule: RolloutSchedule,
        pretrained: Pretrained,
        evaluation: Evaluation,
        *,
        gradient_checkpointing: bool,
        sampler: RolloutEngine | None,
        max_tokens_per_micro_batch: int | None,
        seed: int,
        **adapted: Any,
    ) -> None:
        super().__init__(**adapted)
        self.save_hyperparameters(ignore=["rollout_schedule", "pretrained", "evaluation"])
        self._describe_hyperparameters()
        if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch < 1:
            raise ConfigError(f"model.max_tokens_per_micro_batch must be at least 1, got {max_tokens_per_micro_batch}")
        self.loss, self.reward, self.rollout_schedule, self.pretrained = loss, reward, rollout_schedule, pretrained
        self.sampler: RolloutEngine = sampler or Sampler()
        self.eval_samples, self.seed, self.gradient_checkpointing = evaluation.samples, seed, gradient_checkpointing
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.tokens_of_pass: int | None = None  # what was chosen for the run where that is None
        self.clock = PhaseClock()  # replaced by StepTimer's
        self.signals = StopSignals()  # replaced by GracefulStop's, which are those of the process
        self.generation_listeners: list[Callable[[int, int, int], None]] = []  # called with (running, decoded, max_new_tokens)
        self.last_evaluation: dict[str, dict[str, float]] = {}  # set -> metric -> value; "" for all sets
        self.update = Update(self)
        self._checked: tuple[Any, ...] = ()  # the run whose settings have been checked, until its setup is over
        self._missing_batches = 0  # prediction batches that other ranks have more than this one, where the model is sharded
        if not self._loads_later:
            self.load()
        self.evaluation = evaluation

    # ---- model

    @classmethod
    def unloaded(cls, *arguments: Any, **named: Any) -> Self:
        """Make the module with the arguments of the class and check them all, but leave the model's weights to `load`."""
        module = cls.__new__(cls, *arguments, **named)
        module._loads_later = True
        module.__init__(*arguments, **named)  # type: ignore[misc]
        return module

    @property
    def is_loaded(self) -> bool:
        """Whether the weights have been loaded."""
        return "model" in self._modules

    def load(self) -> None:
        """Load the weights, if that has not been done yet."""
        if self.is_loaded:
            return
        quiet_libraries()
        from hybrid_lightning.engine import Engine  # here, since it imports PEFT, which takes a second

        loaded = self.pretrained.load()
        self._engine = Engine(loaded)
        self.base_parameters = sum(parameter.numel() for parameter in loaded.parameters())
        if self.gradient_checkpointing:
            checkpoint_gradients(loaded, self._engine.backend)
        setattr(self, self.adapter_attribute, loaded)

    @property
    def model(self) -> nn.Module:
        """The language model, adapted or not. Asking for it before `load`, as a subclass's constructor may, loads it."""
        self.load()
        return cast(nn.Module, self._modules["model"])

    @property
    def engine(self) -> "Engine":
        """The engine that computes with the model."""
        self.load()
        return self._engine

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.pretrained.tokenizer

    def set_model(self, model: nn.Module, is_copy: bool = False) -> None:
        """See `AdaptedModule`."""
        super().set_model(model)
        self._engine = self.engine.of(model, is_copy)

    def _backend(self) -> Backend:
        return self.engine.backend

    def on_sharded(self) -> None:
        """Try which fast passes the model supports: now, since that takes forward passes of all ranks together."""
        with self.inference():
            self.weights.in_passes(self.engine.prepare)
        self.generation.compare_again()

    # ---- settings and data

    def setup(self, stage: str) -> None:
        """Refuse settings that cannot work before time is spent on the run (see `check_settings`)."""
        super().setup(stage)
        self.check_settings()
        self._checked = ()  # the next run may be another Trainer's
        if self.is_loaded:  # and adapted, since callbacks are set up first
            self.engine.report()

    def check_settings(self) -> None:
        """Call `check_run_settings`, once in a run: before the modules are scored, or when this module is set up.

        The command line also calls it before the weights are loaded.
        """
        run = (self.trainer, self.trainer.state.fn, self.is_loaded)
        if run != self._checked:
            self.check_run_settings()
            self._checked = run

    def check_run_settings(self) -> None:
        """See `check_run`; a subclass checks its own settings, too."""
        check_run(self)

    def check_start_weights(self, kept: bool) -> None:
        """Raise ConfigError if the loss needs the start policy and its weights are not kept."""
        if self.loss.needs_reference and not kept:
            raise ConfigError(
                "the loss needs the start policy (a KL term with kl_coef > 0, or DPO); set adapter.keep_start_weights=true"
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that completions of these prompts can be scored (see `RewardFunction.check_prompt`) and reported on."""
        for name in {prompt.set_name for prompt in prompts}:
            check_set_name(name)
        for reward in self.reward_terms():
            with in_user_code(reward, "check_prompt"):
                for prompt in prompts:
                    reward.check_prompt(prompt)

    def check_encoding(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that the first prompt of each set can be rendered, tokenized, and completed within the model's positions."""
        for prompt in {prompt.set_name: prompt for prompt in reversed(prompts)}.values():
            tokens = len(self.encode(prompt))
            if self.reward is not None:  # or nothing is completed
                later = self.max_completion_tokens - self.sampler.max_new_tokens  # before the last message that may be sampled
                self.sampler.check_prompt(self.pretrained.config, tokens + later)
        if self.episodes is not None:
            self.episodes.turns.check(prompts)

    @property
    def max_completion_tokens(self) -> int:
        """Tokens of the longest completion, of a message or of all of an episode."""
        return self.sampler.max_new_tokens if self.episodes is None else self.episodes.limits.max_tokens

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if these training prompts are fewer than one rollout takes."""
        self.rollout_schedule.check_prompts(len(prompts))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move micro-batches alone: the prompts of an evaluation have no tensors."""
        return batch.to(device) if isinstance(batch, PolicyBatch) else batch

    def reward_terms(self) -> list[RewardFunction]:
        """The rewards that the reward is the weighted sum of; none without a reward."""
        return [] if self.reward is None else [term for term, _ in self.reward.terms()]

    def teardown(self, stage: str) -> None:
        """See `end_generation`."""
        self.end_generation()
        super().teardown(stage)

    def end_generation(self) -> None:
        """End completions that are under way, a rollout engine, and processes of environments that this process has started."""
        self.generation.shut_down()
        self.sampler.shut_down()
        if self.episodes is not None:
            self.episodes.shut_down()

    # ---- the run

    def run_state(self) -> RunState:
        """What rollouts have to know of the run now."""
        trainer: Any = self._trainer
        if trainer is None:
            return RunState(self.signals, self.generation_listeners)
        return RunState(
            self.signals,
            self.generation_listeners,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            step=int(trainer.global_step),
            steps_left=lambda: float(trainer.estimated_stepping_batches - trainer.global_step),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            device=trainer.strategy.root_device,
            is_training=bool(trainer.training),
            is_resumed=trainer.state.fn == "fit" and trainer.ckpt_path is not None,
            sum_over_ranks=sum_over_ranks,
            gather_over_ranks=gather_objects,
            restart_epoch=lambda: restart_epoch(trainer),
        )

    def check_stop(self) -> None:
        """Raise `RunStopped` on all ranks if one of them has been asked to stop. All ranks have to call it."""
        check_stop(self.signals, self.device)

    def stopping_together(self) -> AbstractContextManager[None]:
        """See `Generation.stopping_together`."""
        return self.generation.stopping_together()

    # ---- completions

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, rendered by the chat template if it has messages; that of an episode names the tools."""
        return self.pretrained.encoder.encode(prompt) if self.episodes is None else self.episodes.turns.first(prompt, ())[0]

    @cached_property
    def generation(self) -> Generation:
        """Completes prompts for this policy."""
        ahead = self.rollout_schedule.rollouts_ahead
        return Generation(self, self.sampler, self.episodes, self.run_state, seed=self.seed, rollouts_ahead=ahead)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Within this context: eval mode, no gradient, the Trainer's precision."""
        with evaluation_mode(self.model), torch.no_grad(), self.precision():
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """A context with the Trainer's precision; without a Trainer, with the precision of the model's dtype."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else autocast_of(self.model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int = 1,
        generator: Draws = None,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> Rollouts:
        """Complete prompts with the current policy: P * G sequences.

        Args:
            prompts: P prompts.
            samples_per_prompt: G; 1 if `greedy`.
            generator: Random generator on the model's device, or `PromptDraws` of these prompts.
            greedy: Take the most probable tokens instead of sampling.
            on_completion: See `SamplingRequest`; `arriving` makes one.

        Raises:
            RolloutError: If a rollout engine fails, or has other weights than the policy.
        """
        return self.generation.begin(prompts, samples_per_prompt, generator, greedy, on_completion=on_completion).result()

    def arriving(self, prompts: Sequence[Prompt], samples_per_prompt: int) -> ArrivingRewards:
        """Scores G completions of each prompt while others are still being generated, for `generate` and `score`."""
        assert self.reward is not None
        return ArrivingRewards(self.reward, repeat_prompts(prompts, samples_per_prompt))

    def score(self, rollouts: Rollouts, arriving: ArrivingRewards | None = None) -> Rewards:
        """Rewards of rollouts, on their device; `arriving` has begun to score them."""
        assert self.reward is not None
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        counted = None if self.episodes is None else [not has_failed(completion) for completion in rollouts.completions]
        with self.signals.interruptible():
            rewards = evaluate_reward(self.reward, rollouts.completions, prompts, counted, arriving)
        return rewards.to(rollouts.sequences.completion_ids.device)

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """The answer that the reward finds in each completion, None if it finds none (see `RewardFunction.extract_answer`)."""
        assert self.reward is not None
        return extract_answers(self.reward, rollouts.completions, repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt))

    # ---- training (see the top of this file)

    @abstractmethod
    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> RolloutFuture[TrainedRollout]:
        """See `RolloutSource`."""

    @abstractmethod
    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """See `RolloutSource`."""

    @abstractmethod
    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies of completions, [B, T] each."""

    @property
    def calibration_seed(self) -> int:
        """Seed of the order and of the completions of calibration prompts, which are not those of training."""
        return self.seed + 7919

    def calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`logprobs` in the Trainer's precision, outside of a training step."""
        with self.precision():
            return self.logprobs(sequences)

    @abstractmethod
    def calibration_losses(
        self, num_prompts: int | None = None, kept: ScoringProgress | None = None, steps: int | None = None
    ) -> CalibrationLosses:
        """Losses of the start policy, whose mean gradient scores the modules.

        Args:
            num_prompts: Training prompts to use; None uses as many as one optimizer step or rollout has.
            kept: Saves what is made before the first loss, and returns what a stopped run has saved.
            steps: The losses of as many optimizer steps; `num_prompts` is not used then.
        """

    @abstractmethod
    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares in those of the optimizer step.

        Some losses average over `micro_batch_tokens`, the completion tokens of the whole micro-batch.
        """

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: rollouts of these prompts. A data module's `train_dataloader` returns it."""
        return make_rollout_loader(self, prompts)

    def on_fit_start(self) -> None:
        """Let a resumed run's loader go on from its state in the checkpoint."""
        # Where a schedule has asked for the run's number of steps, Lightning has made the train dataloader already, before it
        # restores the state of its loops, and would not restore the loader's any more. So it has to make another one.
        self.trainer.fit_loop._combined_loader = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `AdaptedModule`; with the fast passes of this run, and their tokens."""
        super().on_save_checkpoint(checkpoint)
        passes = self.engine.passes() if self.engine.is_prepared else {}
        checkpoint[CHECKPOINT_KEY] |= {"passes": passes, **saved_pass_tokens(self)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `AdaptedModule`. A resumed run that computes by other passes says so."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None:
            restore_pass_tokens(self, checkpoint[CHECKPOINT_KEY])
            if self.trainer.state.fn == "fit":
                self.engine.continues(checkpoint[CHECKPOINT_KEY].get("passes", {}))

    def on_train_epoch_start(self) -> None:
        """Begin the epoch with a new optimizer step, even if the last epoch ended in the middle of one."""
        self.update = Update(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock's phase "update", after the callbacks' hooks of this name; `StepTimer` ends it."""
        self.clock.switch("update")

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch (see `Update.micro_batch`)."""
        return self.update.micro_batch(batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients, unless the update has done so."""
        self.update.clear_gradients(optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each parameter group before clipping; TrainingError if one is not finite."""
        self.update.log_gradient_norms(optimizer)

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        """Give a rollout engine with weights of its own the policy's current ones."""
        if self.reward is not None:  # or nothing is completed
            self.generation.update()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Complete and score a batch of prompts, greedily and by sampling."""
        # A run that is stopped in training is saved by all ranks together; a validation by itself has nothing to save.
        with self.stopping_together() if self.trainer.state.fn == "fit" else nullcontext():
            self.evaluation.add(self, "val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self.sampler.release_memory()
        self.last_evaluation = self.evaluation.end(self, "val")

    def test_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Complete and score a batch of prompts, greedily and by sampling."""
        self.evaluation.add(self, "test", batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        self.last_evaluation = self.evaluation.end(self, "test")

    def on_predict_epoch_start(self) -> None:
        """Update a rollout engine; where the model is sharded, find out how many more batches than this rank another one has."""
        if self.reward is not None:
            self.generation.update()
        if self.weights.sharded:
            batches = sum(int(count) for count in self.trainer.num_predict_batches)
            self._missing_batches = max(gather_counts(batches, self.device)) - batches

    def on_predict_epoch_end(self) -> None:
        """Gather the weights as often as the rank with the most batches: no prompt is repeated to make the ranks even."""
        for _ in range(0 if self.sampler.needs_weight_sync else 2 * self._missing_batches):  # greedily and by sampling
            self.weights.gathered(lambda: None)

    def predict_step(self, batch: Sequence[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of a batch of prompts, greedy and sampled, with their rewards, as records for JSON."""
        return predictions(self, batch)

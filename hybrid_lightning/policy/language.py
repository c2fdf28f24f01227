"""`LanguageModule`: a causal language model under Lightning, whatever it is trained by.

    AdaptedModule <- LanguageModule <- PolicyModule                        its own rollouts and rewards
                                    <- ExampleModule <- SupervisedModule   completions that the data has
                                                     <- PreferenceModule   pairs of them, one preferred

It loads the model, generates completions, validates and tests, and makes the optimizer. What a subclass adds is the data that one
optimizer step is made from, and its loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.engine import Backend, base_model
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.adaptation import AdaptedModule
from hybrid_lightning.policy.evaluation import EvaluationMetrics, evaluate, log_evaluation, predictions, repeat_prompts
from hybrid_lightning.policy.modes import checkpoint_gradients, evaluation_mode, precision_of, product_dtype
from hybrid_lightning.policy.pretrained import Pretrained
from hybrid_lightning.policy.run_checks import check_prompts, check_run, warn_of_differences
from hybrid_lightning.policy.step_times import PhaseClock
from hybrid_lightning.policy.update import Update, rollout_loader
from hybrid_lightning.rewards import RewardFunction, evaluate_reward, extract_answers
from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import Stops, check_positions
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.stopping import RunStopped, StopSignals
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollouts, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine


class LanguageModule(AdaptedModule, ABC):
    """A language model that generates, is evaluated and is trained.

    It is frozen as loaded; `HybridAdapterSetup` makes part of it trainable.

    Args:
        loss: What is trained by; says by `needs_reference` whether it compares with the start policy.
        reward: Scores completions; None where nothing is generated.
        rollout_schedule: Sizes of a rollout and its optimizer steps.
        model: `embedded`, a folder (also one with an adapter alone), a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights in memory: `float32`, or `bfloat16` together with `trainer.precision=bf16-mixed` or `bf16-true`.
        attn_implementation: Such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None takes the tokenizer's own.
        chat_template_kwargs: Variables of the chat template.
        sampler: Decoding parameters; None takes `Sampler()`.
        eval_samples: Completions per prompt in validation, test and predict (the n of avg@n), beside the greedy one.
        max_tokens_per_micro_batch: Tokens of prompts and completions that one forward and backward pass takes, a prompt counted
            once for its completions. Smaller takes less memory for activations and gives the same gradient. None chooses by the
            sizes of the model (see `default_token_budget`).
        seed: Of the order of the data, sampling and evaluation.
        **kwargs: See `AdaptedModule`.

    Raises:
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    shown_metrics: tuple[str, ...] = ("reward", "completions/mean_length")  # beside the progress bar
    rows_together = 1  # so many neighbouring rows are never cut apart: the pairs of a preference loss
    _loads_later = False

    def __init__(
        self,
        loss: Any,
        reward: RewardFunction | None,
        rollout_schedule: RolloutSchedule,
        *,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        sampler: Sampler | None = None,
        eval_samples: int = 8,
        max_tokens_per_micro_batch: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore=["rollout_schedule"])
        self._describe_hyperparameters()
        for name, count in (("eval_samples", eval_samples), ("max_tokens_per_micro_batch", max_tokens_per_micro_batch)):
            if count is not None and count < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {count}")
        self.loss, self.reward, self.rollout_schedule = loss, reward, rollout_schedule
        self.sampler, self.eval_samples, self.seed = sampler or Sampler(), eval_samples, seed
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.dtype_name, self.gradient_checkpointing = dtype, gradient_checkpointing
        self.pretrained = Pretrained(model, revision, dtype, attn_implementation, chat_template, chat_template_kwargs)
        self.update = Update()
        self.clock = PhaseClock()  # StepTimer gives its own
        self.signals = StopSignals()  # GracefulStop gives those of the process
        self.generation_listeners: list[Callable[[int, int, int], None]] = []  # of (running, decoded, max_new_tokens)
        self.last_evaluation: dict[str, dict[str, float]] = {}  # set -> metric -> value; "" for all sets
        self._stops: Stops | None = None  # of completions, made for the tokenizer once
        self._told_what_differs = False
        self._missing_batches = 0  # of a prediction, on this rank, where the model is sharded
        if not self._loads_later:
            self.load()
        self.validation_metrics, self.test_metrics = EvaluationMetrics(eval_samples), EvaluationMetrics(eval_samples)

    # ---- model

    @classmethod
    def unloaded(cls, *arguments: Any, **named: Any) -> Self:
        """Make the module with the arguments of the class, all checked, but without the model's weights: `load` loads them."""
        module = cls.__new__(cls)
        module._loads_later = True
        module.__init__(*arguments, **named)  # type: ignore[misc]
        return module

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are there."""
        return "model" in self._modules

    def load(self) -> None:
        """Load the weights, if they are not there yet."""
        if self.is_loaded:
            return
        from hybrid_lightning.engine import Engine  # with PEFT, which takes a second to import

        loaded = self.pretrained.load()
        self._engine = Engine(loaded)
        self.base_parameters = sum(parameter.numel() for parameter in loaded.parameters())
        if self.gradient_checkpointing:
            checkpoint_gradients(loaded, self._engine.backend)
        setattr(self, self.adapter_attribute, loaded)

    @property
    def model(self) -> nn.Module:
        """The language model, adapted or not; loaded if somebody asks before `load`, as a subclass's constructor may."""
        self.load()
        return cast(nn.Module, self._modules["model"])

    @property
    def engine(self) -> "Engine":
        """What computes with the model."""
        self.load()
        return self._engine

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.pretrained.tokenizer

    def _put(self, model: nn.Module) -> None:
        super()._put(model)
        self._engine = self.engine.of(model)

    def _backend(self) -> Backend:
        return self.engine.backend

    def on_sharded(self) -> None:
        """Find out what the model can do, which takes forward passes: not in the first training pass, nor on some ranks alone."""
        with self.inference():
            self.weights.gathered(self.engine.prepare)

    # ---- settings and data

    def setup(self, stage: str) -> None:
        """Check what cannot work before anything is spent (see `check_settings`)."""
        super().setup(stage)
        self.check_settings()
        if self.is_loaded:  # and adapted, since callbacks come first
            self.engine.report()

    def check_settings(self) -> None:
        """Called before scoring and before training.

        Raises:
            ConfigError: If the strategy cannot work, the precision cannot work or contradicts the dtype, or the loss needs a
                start policy that is not kept.
        """
        check_run(self.trainer, self.optimizer_class, self.dtype_name, self.quantization)
        if self.loss.needs_reference and self.plan is not None and not self.keep_start_weights:
            raise ConfigError(
                "the loss needs the start policy (a KL term with kl_coef > 0, or DPO); set adapter.keep_start_weights=true"
            )
        if self.is_loaded and not self._told_what_differs:  # what the attention is, the model says
            self._told_what_differs = True
            warn_of_differences(
                self.trainer, getattr(base_model(self.model).config, "_attn_implementation", None), self.reward_terms()
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that completions of these prompts can be scored (see `RewardFunction.check_prompt`) and reported on."""
        check_prompts(prompts, self.reward_terms())

    def check_encoding(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that the first prompt of each set can be rendered, tokenized, and completed within the model's positions."""
        for prompt in {prompt.set_name: prompt for prompt in reversed(prompts)}.values():
            tokens = len(self.encode(prompt))
            if self.reward is not None:  # or nothing is completed
                check_positions(self.pretrained.config, tokens, self.sampler.max_new_tokens)

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if these training prompts are fewer than one rollout takes."""
        self.rollout_schedule.check_prompts(len(prompts))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Prompts have nothing to move."""
        return batch.to(device) if isinstance(batch, PolicyBatch) else batch

    def reward_terms(self) -> list[RewardFunction]:
        """The reward's parts."""
        return [] if self.reward is None else [term for term, _ in self.reward.terms()]

    # ---- signals

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Let all ranks stop if a signal has asked one of them to, here or before. All have to enter and leave it."""
        with suppress(RunStopped):  # of this rank; the others learn of it now
            yield
        self.check_stop()

    def check_stop(self) -> None:
        """Raise `RunStopped` on all ranks if one of them has been asked to stop. All have to call it."""
        number = max(gather_counts(self.signals.requested, self.device))
        if number:
            raise RunStopped(number, together=True)

    # ---- completions

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, rendered by the chat template if it has messages."""
        return self.pretrained.encoder.encode(prompt)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode, no gradient, the Trainer's precision; all put back afterwards."""
        with evaluation_mode(self.model), torch.no_grad(), self.precision():
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """A context with the Trainer's precision; without a Trainer that of the base model."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else precision_of(self.model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int = 1,
        generator: torch.Generator | PromptDraws | None = None,
        greedy: bool = False,
    ) -> Rollouts:
        """Complete prompts with the policy as it is now: P * G sequences.

        Args:
            prompts: P prompts.
            samples_per_prompt: G; 1 if `greedy`.
            generator: Random generator on the model's device, or `PromptDraws` of these prompts.
            greedy: Most probable tokens instead of sampled ones.
        """

        def on_token(running: int, decoded: int) -> None:
            for listener in self.generation_listeners:
                listener(running, decoded, self.sampler.max_new_tokens)

        def sample() -> Rollouts:
            # Nothing here waits for another rank, which might wait for this one in vain.
            with self.signals.at_once(), self.engine.sampling(product_dtype(self.model)):
                return self.sampler.sample(
                    self.engine,
                    self.tokenizer,
                    prompts,
                    [self.encode(prompt) for prompt in prompts],
                    samples_per_prompt,
                    generator=generator,
                    greedy=greedy,
                    stops=self._stops,
                    on_token=on_token,
                )

        if self._stops is None:
            self._stops = self.sampler.stops(self.tokenizer, self.pretrained.stop_ids)
        with self.inference():
            return self.weights.gathered(sample)

    def score(self, rollouts: Rollouts) -> Rewards:
        """Rewards of rollouts, on their device."""
        assert self.reward is not None
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        with self.signals.at_once():
            rewards = evaluate_reward(self.reward, rollouts.completions, prompts)
        return rewards.to(rollouts.sequences.completion_ids.device)

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """What each completion answers, as the reward takes it out of the text (see `RewardFunction.extract_answer`)."""
        assert self.reward is not None
        return extract_answers(self.reward, rollouts.completions, repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt))

    # ---- training: a rollout source (see `RolloutLoader`), and the loss of what it gives

    @abstractmethod
    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies of completions, [B, T] each."""

    def calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`logprobs` in the Trainer's precision, outside of a training step."""
        with self.precision():
            return self.logprobs(sequences)

    @abstractmethod
    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch's rows, all of them shares in the optimizer step's.

        Args:
            chunk: The rows.
            micro_batch_tokens: Completion tokens of the whole micro-batch.
        """

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: rollouts of these prompts. A data module's `train_dataloader` returns it."""
        return rollout_loader(self, prompts)

    def on_train_start(self) -> None:
        """Let the loader go on where the checkpoint was."""
        # Lightning does so as it asks for the loader: too early, where a schedule has asked how many steps `max_epochs` are.
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_epoch_start(self) -> None:
        """An epoch begins with an optimizer step, also after one that was cut short within a step."""
        self.update = Update()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The update begins, after all callbacks' hooks of this name; `StepTimer` sees its end before any other callback."""
        self.clock.switch("update")

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch (see `Update`)."""
        return self.update.micro_batch(self, batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients, unless the update has done so."""
        self.update.clear_gradients(optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping; TrainingError if one is not finite."""
        self.update.log_gradient_norms(self, optimizer)

    # ---- evaluation

    def validation_names(self, sets: Collection[str]) -> list[str]:
        """What a validation on prompts of these sets logs."""
        names = self.validation_metrics.names(sets)
        return ["/".join(filter(None, ("val", name, value))) for name, values in names.items() for value in values]

    def validation_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Greedy and sampled completions of a batch of prompts."""
        # In training all ranks save what they have; a validation by itself has nothing to save.
        with self.stopping_together() if self.trainer.state.fn == "fit" else nullcontext():
            evaluate(self, batch, self.validation_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self.last_evaluation = log_evaluation(self, "val", self.validation_metrics)

    def test_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Greedy and sampled completions of a batch of prompts."""
        evaluate(self, batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        self.last_evaluation = log_evaluation(self, "test", self.test_metrics)

    def on_predict_epoch_start(self) -> None:
        """Find out how many batches other ranks have more than this one."""
        if self.weights.sharded:
            batches = sum(int(count) for count in self.trainer.num_predict_batches)
            self._missing_batches = max(gather_counts(batches, self.device)) - batches

    def on_predict_epoch_end(self) -> None:
        """No prompt is repeated to make the ranks even; those with fewer batches still gather the weights as often."""
        for _ in range(self._missing_batches):
            self.weights.gathered(lambda: None)

    def predict_step(self, batch: Sequence[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Sampled completions of a batch of prompts with their rewards, as records for JSON."""
        return predictions(self, batch, self.pretrained.encoder)

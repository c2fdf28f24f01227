"""`EvaluatedModule`: a policy that completes prompts, is rewarded for it, and reports how well it does."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from transformers import StopStringCriteria

from hybrid_lightning.engine import base_model
from hybrid_lightning.metrics import check_set_name
from hybrid_lightning.policy.evaluation import EvaluationMetrics, prediction_records, repeat_prompts
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.policy.modes import evaluation_mode
from hybrid_lightning.policy.reproducibility import check_reproducibility
from hybrid_lightning.rewards import RewardFunction, evaluate_reward, extract_answers
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import Sampler, check_positions
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.stopping import RunStopped, StopSignals
from hybrid_lightning.types import Prompt, Rewards, Rollouts

_HALF = (torch.bfloat16, torch.float16)

GenerationListener = Callable[[int, int, int], None]


class EvaluatedModule(LanguageModule):
    """Generation, rewards, and the hooks of validation, test and prediction; a subclass sets the attributes."""

    sampler: Sampler
    reward: RewardFunction
    eval_samples: int
    seed: int
    validation_metrics: EvaluationMetrics
    test_metrics: EvaluationMetrics

    def __init__(self) -> None:
        super().__init__()
        self.generation_listeners: list[GenerationListener] = []  # called with (running, decoded, max_new_tokens)
        self.last_evaluation: dict[str, dict[str, float]] = {}  # set -> metric -> value; "" for all sets
        self.signals = StopSignals()  # GracefulStop gives those of the process
        self._told_what_differs = False
        self._stop_criteria: StopStringCriteria | None = None  # of the sampler, made for the tokenizer once
        self._missing_batches = 0  # of a prediction, on this rank, where the model is sharded

    def check_settings(self) -> None:
        """See `LanguageModule`; also warn, once, of what can make two runs with one seed differ."""
        super().check_settings()
        if self.is_loaded and not self._told_what_differs:  # what the attention is, the model says
            self._told_what_differs = True
            attention = getattr(base_model(self.model).config, "_attn_implementation", None)
            rewards = [] if self.reward is None else [term for term, _ in self.reward.terms()]
            check_reproducibility(self.trainer, attention, rewards)

    def on_sharded(self) -> None:
        """Find out what the model can do, which takes forward passes: not in the first training pass, nor on some ranks alone."""
        with self._inference():
            self.weights.gathered(self.engine.prepare)

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

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, rendered by the chat template if it has messages."""
        return self.encoder.encode(prompt)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that completions of these prompts can be scored (see `RewardFunction.check_prompt`) and reported on."""
        for name in {prompt.set_name for prompt in prompts}:
            check_set_name(name)
        for term, _ in self.reward.terms():
            for prompt in prompts:
                term.check_prompt(prompt)

    def check_encoding(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that the first prompt of each set can be rendered, tokenized, and completed within the model's positions."""
        for prompt in {prompt.set_name: prompt for prompt in reversed(prompts)}.values():
            tokens = len(self.encode(prompt))
            if self.reward is not None:  # or nothing is completed
                check_positions(self.model_config, tokens, self.sampler.max_new_tokens)

    def validation_names(self, sets: Collection[str]) -> list[str]:
        """What a validation on prompts of these sets logs."""
        names = self.validation_metrics.names(sets)
        return ["/".join(filter(None, ("val", name, value))) for name, values in names.items() for value in values]

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Eval mode, no gradient, the Trainer's precision; all put back afterwards."""
        with evaluation_mode(self.model), torch.no_grad(), self._precision():
            yield

    def _precision(self) -> Any:
        """The Trainer's; without one that of the base model, beside which trained weights are float32."""
        if self._trainer is not None:
            return self.trainer.precision_plugin.forward_context()
        weight = next(self.model.parameters())
        return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in _HALF else nullcontext()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int = 1,
        generator: torch.Generator | PromptDraws | None = None,
        greedy: bool = False,
    ) -> Rollouts:
        """Complete prompts with the policy as it is now.

        Args:
            prompts: P prompts.
            samples_per_prompt: G; 1 if `greedy`.
            generator: Random generator on the model's device, or `PromptDraws` of these prompts.
            greedy: Most probable tokens instead of sampled ones.

        Returns:
            Rollouts of P * G sequences.
        """

        def on_token(running: int, decoded: int) -> None:
            for listener in self.generation_listeners:
                listener(running, decoded, self.sampler.max_new_tokens)

        def sample() -> Rollouts:
            # Nothing here waits for another rank, which might wait for this one in vain.
            with self.signals.at_once(), self.engine.sampling(_product_dtype(self.model)):
                return self.sampler.sample(
                    self.engine,
                    self.tokenizer,
                    prompts,
                    [self.encode(prompt) for prompt in prompts],
                    samples_per_prompt,
                    generator=generator,
                    greedy=greedy,
                    stop_ids=self.stop_ids,
                    stop_criteria=self._stop_criteria,
                    on_token=on_token,
                )

        if self._stop_criteria is None:
            self._stop_criteria = self.sampler.stop_criteria(self.tokenizer)
        with self._inference():
            return self.weights.gathered(sample)

    def score(self, rollouts: Rollouts) -> Rewards:
        """Rewards of rollouts, on their device."""
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        with self.signals.at_once():
            rewards = evaluate_reward(self.reward, rollouts.completions, prompts)
        return rewards.to(rollouts.sequences.completion_ids.device)

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """What each completion answers, as the reward takes it out of the text (see `RewardFunction.extract_answer`)."""
        return extract_answers(self.reward, rollouts.completions, repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt))

    def _evaluate(self, prompts: Sequence[Prompt], metrics: EvaluationMetrics) -> None:
        greedy, sampled = self.generate(prompts, 1, greedy=True), self._sample(prompts)
        metrics.update((greedy, self.score(greedy)), (sampled, self.score(sampled)), self.answers(sampled))

    def _sample(self, prompts: Sequence[Prompt]) -> Rollouts:
        # The same draws at every evaluation, and none from the generators that training uses.
        draws = PromptDraws(prompts, self.eval_samples, self.seed + 104_729)
        return self.generate(prompts, self.eval_samples, draws)

    def _log_evaluation(self, prefix: str, metrics: EvaluationMetrics) -> None:
        """Log PREFIX/METRIC over all sets, and PREFIX/SET/METRIC for each that has a name."""
        found = {name: {key: float(value) for key, value in part.items()} for name, part in metrics.compute().items()}
        values = {
            "/".join(filter(None, (prefix, name, key))): value for name, part in found.items() for key, value in part.items()
        }
        self.log_dict(values, sync_dist=self.trainer.world_size > 1, prog_bar=False)
        self.last_evaluation = found
        metrics.reset()

    def validation_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Greedy and sampled completions of a batch of prompts."""
        # In training all ranks save what they have; a validation by itself has nothing to save.
        with self.stopping_together() if self.trainer.state.fn == "fit" else nullcontext():
            self._evaluate(batch, self.validation_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self._log_evaluation("val", self.validation_metrics)

    def test_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Greedy and sampled completions of a batch of prompts."""
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        self._log_evaluation("test", self.test_metrics)

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
        rollouts = self._sample(batch)
        texts = [self.encoder.render(prompt) for prompt in batch]
        return prediction_records(rollouts, self.score(rollouts), texts, self.answers(rollouts))


def _product_dtype(model: nn.Module) -> torch.dtype | None:
    """What autocast makes of the operands of matrix products; None without it."""
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

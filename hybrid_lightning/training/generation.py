"""`Generation`: completions of a policy, by its own weights or by a rollout engine that is given them.

    update    gives an engine with weights of its own those that training has changed
    begin     completes prompts, where the engine completes elsewhere while this process goes on, and says which weights did

In one process an engine is updated before it completes, if weights have changed since. Several processes update theirs together
before each rollout and each evaluation; only calibration, which the first makes alone, updates without the others.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.episodes.ahead import EpisodesAhead
from hybrid_lightning.episodes.episodes import task_seeds
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.precision import product_dtype
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import Begun, PolicyWeights, ServedModel, Stops
from hybrid_lightning.sharding.ranks import gather_objects, world_size
from hybrid_lightning.types import Completion, Prompt, Rollouts

if TYPE_CHECKING:
    from hybrid_lightning.training.language import LanguageModule


# Nats by which the log-probabilities of an engine may differ from the policy's, on average. In bfloat16 0.02 was seen, with other
# weights more than 2.
_LARGEST_DIFFERENCE = 0.5
_COMPARED = 4  # completions


class Generation:
    """Completes prompts for a policy."""

    def __init__(self, policy: "LanguageModule") -> None:
        self._policy = policy
        self._agrees = False  # whether the engine has been seen to compute what the policy computes
        self._under_way: list[Begun[Rollouts]] = []  # completions by the engine's weights of now
        self._ahead: EpisodesAhead | None = None  # plays the episodes of rollouts ahead
        self.update_seconds = 0.0  # that the last update took
        self.waited_seconds = 0.0  # for the completions that were finished last

    @cached_property
    def _stops(self) -> Stops:
        """What ends a completion; slow to make where there are stop strings."""
        policy = self._policy
        ids = policy.pretrained.stop_ids if policy.episodes is None else policy.episodes.turns.stop_ids
        return policy.sampler.stops(policy.tokenizer, ids)

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        generator: torch.Generator | PromptDraws | None,
        greedy: bool = False,
        ahead: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> Begun[Rollouts]:
        """Begin to complete prompts with the weights of now; where completions are made in this process, `finish` makes them.

        Arguments are those of `LanguageModule.generate`, and `ahead` that of `update`.

        Raises:
            RolloutError: If the engine cannot be given these weights; from `finish`, if it fails, or has other ones.
        """
        policy, sampler = self._policy, self._policy.sampler
        if sampler.needs_weight_sync and (world_size() == 1 or self._is_alone):
            self._give(together=False, ahead=ahead)
        if sampler.needs_weight_sync and self._is_behind:
            raise RolloutError(
                "the rollout engine has other weights than the policy; let all processes call policy.generation.update() before "
                "they complete prompts"
            )
        episodes, samples, step, waited = policy.episodes, samples_per_prompt, self._step, list[float]()

        def on_token(running: int, decoded: int) -> None:
            for listener in policy.generation_listeners:
                listener(running, decoded, sampler.max_new_tokens)

        options: dict[str, Any] = {"generator": generator, "greedy": greedy, "stops": self._stops, "on_token": on_token}
        options |= {} if on_completion is None else {"on_completion": on_completion}
        if episodes is None:
            ids = [policy.encode(prompt) for prompt in prompts]
            begun = sampler.begin(policy.engine, policy.tokenizer, prompts, ids, samples, **options)
        else:
            seeds = task_seeds(prompts, generator, policy.seed)
            if ahead and sampler.is_remote and policy.rollout_schedule.rollouts_ahead:
                self._ahead = self._ahead or EpisodesAhead(episodes)
                begun = self._ahead.begin(policy.engine, prompts, samples, seeds, **options)
            else:
                begun = Begun(partial(episodes.play, policy.engine, prompts, samples, seeds, **options))
        if sampler.is_remote:
            self._under_way.append(begun)

        def sample() -> Rollouts:
            own = sampler.needs_weight_sync
            # A signal may end this at once: no other rank waits for this one meanwhile.
            with policy.signals.interruptible(), nullcontext() if own else policy.engine.sampling(product_dtype(policy.model)):
                return begun.finish()

        def finish() -> Rollouts:
            if sampler.is_remote:  # what is made here may need all ranks, which a signal must not leave alone
                wait()
                self.waited_seconds = sum(waited)
            self._under_way = [other for other in self._under_way if other is not begun]
            with policy.inference():
                rollouts = sample() if sampler.needs_weight_sync else policy.weights.gathered(sample)
            if rollouts.sequences.weights_step is None:  # all by those of the beginning, which an engine has, too
                made_by = torch.full_like(rollouts.sequences.completion_ids, step)
                rollouts = replace(rollouts, sequences=replace(rollouts.sequences, weights_step=made_by))
            # A policy that is split computes with all ranks, and only in training do all of them complete equally often.
            compares = sampler.needs_weight_sync and (not policy.weights.sharded or policy.trainer.training)
            if compares and not self._agrees and step == self._step:
                self._compare(rollouts, greedy)
            return rollouts

        def wait() -> None:
            started = time.perf_counter()
            with policy.signals.interruptible():
                begun.wait()
            waited.append(time.perf_counter() - started)

        return Begun(finish, wait, begun.cancel)

    def update(self, ahead: bool = False) -> None:
        """Give the engines of several processes the policy's weights now. All ranks have to call it.

        Args:
            ahead: Whether completions that are under way for a later rollout may go on with the new weights, where the engine
                can; else they are waited for first.

        Raises:
            RolloutError: If that fails on one of them.
        """
        policy = self._policy
        # Without a reward nothing is completed, and in one process `begin` does it.
        if policy.sampler.needs_weight_sync and policy.reward is not None and world_size() > 1:
            self._give(together=True, ahead=ahead)

    def shut_down(self) -> None:
        """End completions that are under way, and what plays their episodes."""
        for begun in self._under_way:
            begun.cancel()
        self._under_way = []
        if self._ahead is not None:
            self._ahead.shut_down()

    def compare_again(self) -> None:
        """Compare the engine with the policy at the next completion: on all ranks, where this is called on all."""
        self._agrees = False

    def metrics(self) -> dict[str, float]:
        """Seconds of the last rollout; nothing where completions are made by the policy itself.

        They are `sampling/weights_update_s`, for the engine's last update; where it completes elsewhere also `sampling/waited_s`,
        for which training waited for the completions, and `sampling/engine_idle_s`, for which the engine had nothing to do before
        the last requests.
        """
        sampler, found = self._policy.sampler, {"sampling/weights_update_s": self.update_seconds}
        if sampler.is_remote:
            found |= {"sampling/waited_s": self.waited_seconds, "sampling/engine_idle_s": sampler.idle_seconds}
        return found if sampler.needs_weight_sync else {}

    def check(self) -> None:
        """Raise ConfigError if the engine cannot sample for this policy, before time is spent on the run."""
        if self._policy.sampler.needs_weight_sync:
            self._policy.sampler.check_model(self._served_model)

    def _give(self, together: bool, ahead: bool) -> None:
        """Update the engine of this rank; where all ranks are here, `together`, a failure on one is raised on all."""
        policy, sampler, began = self._policy, self._policy.sampler, time.perf_counter()
        before, base = sampler.version, policy.base_digest
        stopping = policy.stopping_together if together else nullcontext
        if policy.quantization is not None and policy.plan is not None:  # the base is quantized when it is adapted
            base = f"{base} {policy.quantization.to_config()}"
        from hybrid_lightning.model.current_weights import CurrentWeights  # with PEFT, which is slow to import

        weights: PolicyWeights = CurrentWeights(policy.model, policy.weights, base, self._step, policy.global_rank == 0)
        model = self._served_model
        failure: Exception | None = None
        waits = sampler.is_remote and not (ahead and sampler.inflight_updates)
        if waits:
            with stopping(), policy.signals.interruptible():
                for begun in self._under_way:
                    with suppress(RolloutError):  # whoever needs them is told by `finish`
                        begun.wait()
            self._under_way = []
        with sampler.updating():
            if sampler.is_remote and not waits:
                sampler.go_on_with(weights.version)
                if together:
                    gather_objects(None)  # the other ranks are as far
            everything = self._all_need(weights, model) if policy.weights.sharded else None
            # Servers that do not answer are tried for minutes, in which a signal may come. It must not tear apart what all ranks
            # gather together.
            may_stop = sampler.is_remote and not policy.weights.sharded
            with stopping(), policy.signals.interruptible() if may_stop else nullcontext():
                try:
                    sampler.update(weights, model, everything)
                except Exception as error:
                    failure = error
            if sampler.version != before:
                self.update_seconds = time.perf_counter() - began
            if together:
                self.fail_together(failure)
            elif failure is not None:
                raise failure

    def _all_need(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether one rank's engine needs all weights. All ranks have to call it, since they gather the same weights then."""
        sampler, needed = self._policy.sampler, False
        with self._policy.stopping_together(), self._policy.signals.interruptible():
            needed = (weights.is_sender or not sampler.shared_by_ranks) and sampler.needs_everything(weights, model)
        return any(gather_objects(needed))

    def fail_together(self, failure: Exception | None) -> None:
        """Raise a failure of one rank's engine, None on the others, on all ranks. All ranks have to call it."""
        if self._policy.sampler.needs_weight_sync:
            first = next(filter(None, gather_objects(None if failure is None else str(failure))), None)
            if failure is None and first is not None:
                raise RolloutError(first)
        if failure is not None:
            raise failure

    def _compare(self, rollouts: Rollouts, greedy: bool) -> None:
        """Compare the engine's log-probabilities of a few completions with the policy's, once; RolloutError if they differ."""
        policy, sampler = self._policy, self._policy.sampler
        self._agrees = True
        if not sampler.keeps_all_tokens and not greedy:
            return  # its log-probabilities are those among the tokens that are kept
        tokens = rollouts.sequences.sampled_mask.sum(dim=1)
        compared = (tokens == 0).long().argsort(stable=True)[:_COMPARED]  # nothing was sampled in an episode that is left out
        rows = rollouts.sequences.rows(compared)
        temperature = 1.0 if greedy else sampler.temperature
        with policy.inference():
            logprobs, _ = policy.weights.as_forward(lambda: token_logprobs(policy.engine, rows, temperature))
        sampled = rollouts.sampling_logprobs[compared, : logprobs.shape[1]]
        difference = float((logprobs - sampled).abs()[rows.sampled_mask].sum() / rows.sampled_mask.sum().clamp(min=1))
        if not difference <= _LARGEST_DIFFERENCE:  # nan, too
            raise RolloutError(
                f"the rollout engine's log-probabilities differ from the policy's by {difference:.2g} nats a token: it computes "
                "with another model, or does not know this architecture; start it with the policy's model, or leave "
                "model.sampler out"
            )

    @property
    def _is_behind(self) -> bool:
        """Whether the engine has no weights yet, or those of an earlier step."""
        version = self._policy.sampler.version
        return version is None or version.step != self._step

    @property
    def _is_alone(self) -> bool:
        """Whether this rank completes before the others do: the first one, in calibration."""
        policy = self._policy
        return self._is_behind and not policy.weights.sharded and (not policy.sampler.shared_by_ranks or policy.global_rank == 0)

    @property
    def _step(self) -> int:
        """Optimizer steps that made the policy's weights."""
        trainer = self._policy._trainer
        return 0 if trainer is None else int(trainer.global_step)

    @property
    def _served_model(self) -> ServedModel:
        policy, trainer = self._policy, self._policy._trainer
        device = next(policy.model.parameters()).device if trainer is None else trainer.strategy.root_device
        with policy.precision():
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else DTYPES[policy.pretrained.dtype]
        pretrained = policy.pretrained
        resumed = trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None
        return ServedModel(pretrained.config, pretrained.tokenizer, self._folder, dtype, device, resumed)

    @cached_property
    def _folder(self) -> str | None:
        """The folder from which an engine can read the start policy's weights; None if they are not in one as they are."""
        policy = self._policy
        source = policy.pretrained.source
        if source.adapter is not None or "gguf_file" in source.arguments or policy.quantization is not None:
            return None
        if not source.on_hub:
            return str(source.location)
        config = cached_file(source.location, "config.json", local_files_only=True, **source.arguments)
        assert config is not None, "the policy has been loaded, so that its files are here"
        return str(Path(config).parent)

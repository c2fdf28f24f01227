"""`Generation`: completions of a policy, made with the policy's own weights or by a rollout engine that receives them.

    update    gives an engine that has its own weights the weights that training has changed
    begin     begins to complete prompts with the current weights; the result records which weights made it

In one process, an engine is updated before it completes prompts, if weights have changed. Several processes update their engines
together before each rollout and each evaluation. Calibration is the exception: the first process runs it, and updates, alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from transformers.utils import cached_file

from hybrid_lightning.engine import autocast_dtype
from hybrid_lightning.episodes.ahead import EpisodesAhead
from hybrid_lightning.episodes.episodes import Episodes, has_failed
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rewards import ArrivingRewards, RewardFunction, evaluate_reward, extract_answers
from hybrid_lightning.rewards.combined import AnyReward, as_reward
from hybrid_lightning.rewards.reward_function import sum_counts
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import Draws, PolicyWeights, SamplingRequest, ServedModel, Stops
from hybrid_lightning.rollout.rng import task_seeds
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.sharding.ranks import gather_objects, world_size
from hybrid_lightning.training.agreement import SEQUENCES, Agreement
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Completion, Message, Prompt, Rewards, Rollouts

Listen = Callable[[Sequence[Sequence[int]], int], Callable[[int, Sequence[int]], object] | None]  # see `Teacher.listen`


class Generation:
    """Completes prompts for a policy, and scores the completions.

    Args:
        policy: The policy.
        sampler: Makes the completions.
        reward: Scores the completions; None if nothing is completed.
        run: The run that trains or evaluates the policy.
        seed: Seed for the tasks of episodes if their rows have no seed.
        episodes: Plays episodes, if completions are episodes; else None.
        rollouts_ahead: See `RolloutSchedule`.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: RolloutEngine,
        reward: AnyReward | None,
        run: Run,
        seed: int = 0,
        episodes: Episodes | None = None,
        rollouts_ahead: int = 0,
    ) -> None:
        self.policy, self.sampler, self.episodes, self.run = policy, sampler, episodes, run
        self.reward = None if reward is None else as_reward(reward)
        self._seed = seed
        sampler.inflight_updates = sampler.is_remote and rollouts_ahead > 1
        may_fail = any(term.max_failed_share is not None for term in self.reward_terms())  # as a judge on a server
        run.shares_failures = sampler.needs_weight_sync or may_fail
        self._agreement = Agreement(policy, sampler, run)
        self._under_way: list[RolloutFuture[Rollouts]] = []  # completions with the engine's current weights
        plays_ahead = episodes is not None and sampler.is_remote and rollouts_ahead > 0
        self._ahead = EpisodesAhead(episodes) if episodes is not None and plays_ahead else None
        self.update_seconds = 0.0  # duration of the last update
        self.waited_seconds = 0.0  # wait for the last finished completions

    @cached_property
    def _stops(self) -> Stops:
        """The stop tokens and stop strings; slow to build if there are stop strings."""
        ids = self.policy.pretrained.stop_ids if self.episodes is None else self.episodes.turns.stop_ids
        return self.sampler.stops(self.policy.pretrained.tokenizer, ids)

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        draws: Draws,
        greedy: bool = False,
        ahead: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
        listen: Listen | None = None,
    ) -> RolloutFuture[Rollouts]:
        """Begin to complete prompts with the current weights; an engine in this process starts when the result is requested.

        See `SamplingRequest` for the arguments, and `update` for `ahead`; `listen` makes `on_tokens` from tokenized prompts.

        Raises:
            RolloutError: If the engine cannot receive these weights, or computes different log-probabilities with them. The
                result raises it if the engine fails or has different weights.
        """
        sampler = self.sampler
        if sampler.needs_weight_sync and (world_size() == 1 or self._is_alone):
            self._give(together=False, ahead=ahead)
        if sampler.needs_weight_sync and self._is_behind:
            raise RolloutError(
                "the rollout engine has other weights than the policy; call generation.update() on all processes before "
                "completing prompts"
            )
        request = SamplingRequest(
            prompts,
            samples_per_prompt=samples_per_prompt,
            draws=draws,
            greedy=greedy,
            stops=self._stops,
            on_token=self._tell,
            on_completion=on_completion,
        )
        waits = not self._still_under_way()
        if self._compares:
            self._agreement.begin(lambda: map(self._fixed_tokens, prompts[:SEQUENCES]))
        begun = self._begin(request, ahead, listen)
        if sampler.is_remote:
            self._under_way = [*self._still_under_way(), begun]
        if self._compares:
            self._agreement.end(waits)
        if sampler.is_remote:
            # The engine works elsewhere, so a signal leaves no other rank waiting.
            begun = begun.within(self.run.interruptible)
        step = self.run.step
        return RolloutFuture(lambda: self._finished(begun, step), begun)

    def _begin(self, request: SamplingRequest, ahead: bool, listen: Listen | None) -> RolloutFuture[Rollouts]:
        engine, episodes = self.policy.engine, self.episodes
        if episodes is None:
            encoder = self.policy.pretrained.encoder
            ids = [encoder.encode(prompt) for prompt in request.prompts]
            on_tokens = None if listen is None else listen(ids, request.samples_per_prompt)
            request = replace(request, prompt_ids=ids, on_tokens=on_tokens)
            return self.sampler.begin(engine, self.policy.pretrained.tokenizer, request)
        seeds = task_seeds(request.prompts, request.draws, self._seed)
        if ahead and self._ahead is not None:
            return self._ahead.begin(engine, request, seeds, on_wait=self._give_again)
        return RolloutFuture(lambda: episodes.play(engine, request, seeds))

    def _finished(self, begun: RolloutFuture[Rollouts], step: int) -> Rollouts:
        """The finished completions that were begun after this optimizer step."""
        policy, sampler = self.policy, self.sampler
        if sampler.is_remote:
            self.waited_seconds = begun.waited_s
            self._under_way = self._still_under_way()

        def sample() -> Rollouts:
            own = sampler.needs_weight_sync
            # A signal may interrupt this, since no other rank waits for this one in the meantime.
            with self.run.interruptible(), nullcontext() if own else policy.engine.sampling(autocast_dtype(policy.device)):
                return begun.result()

        with policy.inference():
            rollouts = sample() if sampler.needs_weight_sync else policy.weights.gathered(sample)
        if rollouts.sequences.weights_step is None:  # the weights at the beginning sampled all tokens
            made_by = torch.full_like(rollouts.sequences.completion_ids, step)
            rollouts = replace(rollouts, sequences=replace(rollouts.sequences, weights_step=made_by))
        if self._compares:
            self._agreement.end()
        return rollouts

    @property
    def _compares(self) -> bool:
        """Whether to compare the engine with the policy now.

        A split policy computes on all ranks together, and only in training do all ranks complete prompts equally often.
        """
        return self.sampler.scores_prompts and (not self.policy.weights.sharded or self.run.is_training)

    def _fixed_tokens(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt with its reference answer, no longer than a prompt with its longest completion."""
        ids, answer = self.encode(prompt), []
        if prompt.answer is not None:
            with suppress(Exception):  # a tokenizer without an "unknown" token raises a private exception class
                answer = list(self.policy.pretrained.tokenizer(str(prompt.answer), add_special_tokens=False)["input_ids"])
        return [*ids, *answer][: len(ids) + self.sampler.max_new_tokens - 1]

    def _still_under_way(self) -> list[RolloutFuture[Rollouts]]:
        return [future for future in self._under_way if not future.done()]

    def _tell(self, running: int, decoded: int) -> None:
        self._give_again()
        for listener in self.run.listeners:
            listener(running, decoded, self.sampler.max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int = 1,
        draws: Draws = None,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> Rollouts:
        """Complete prompts with the current policy: P * G sequences.

        Args:
            prompts: P prompts.
            samples_per_prompt: G; 1 if `greedy`.
            draws: Random generator on the model's device, or `PromptDraws` of these prompts.
            greedy: Take the most probable tokens instead of sampling.
            on_completion: See `SamplingRequest`; `arriving` makes one.

        Raises:
            RolloutError: If a rollout engine fails, or has different weights than the policy.
        """
        return self.begin(prompts, samples_per_prompt, draws, greedy, on_completion=on_completion).result()

    def begin_scored(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, draws: Draws, listen: Listen | None = None
    ) -> RolloutFuture[tuple[Rollouts, Rewards]]:
        """Begin to complete this rank's prompts of a rollout, and to score completions as they arrive.

        All ranks must request the result together. See `begin` for the arguments.
        """
        arriving = self.arriving(prompts, samples_per_prompt)
        with self._phase("generate"):
            self.update(ahead=True)
            told = arriving.on_completion
            begun = self.begin(prompts, samples_per_prompt, draws, ahead=True, on_completion=told, listen=listen)

        def scored(rollouts: Rollouts) -> tuple[Rollouts, Rewards]:
            with self._phase("reward"):
                return rollouts, self.score(rollouts, arriving)

        return begun.within(lambda: self._phase("generate")).then(scored, on_cancel=arriving.cancel)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of a rollout. After the phase, all ranks stop if one of them must stop."""
        with self.run.stopping_together(), self.run.clock.phase(name):
            yield

    def arriving(self, prompts: Sequence[Prompt], samples_per_prompt: int) -> ArrivingRewards:
        """A scorer for G completions of each prompt while others are still being generated, for `generate` and `score`."""
        assert self.reward is not None
        return ArrivingRewards(self.reward, repeat_prompts(prompts, samples_per_prompt))

    def score(self, rollouts: Rollouts, arriving: ArrivingRewards | None = None) -> Rewards:
        """Rewards of rollouts, on their device; `arriving` may have begun to score them."""
        assert self.reward is not None
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        counted = None if self.episodes is None else [not has_failed(completion) for completion in rollouts.completions]
        with self.run.interruptible():
            rewards = evaluate_reward(self.reward, rollouts.completions, prompts, counted, arriving)
        return rewards.to(rollouts.sequences.completion_ids.device)

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """The answer that the reward finds in each completion, or None (see `RewardFunction.extract_answer`)."""
        assert self.reward is not None
        return extract_answers(self.reward, rollouts.completions, repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt))

    def reward_counts(self) -> dict[str, float]:
        """Counts of the reward since the last call, such as calls of a judge, over all ranks. All ranks must call this."""
        own = sum_counts(term.take_counts() for term in self.reward_terms())
        return sum_counts(gather_objects(own)) if own else own

    def reward_terms(self) -> list[RewardFunction]:
        """The rewards in the reward's weighted sum; none without a reward."""
        return [] if self.reward is None else [term for term, _ in self.reward.terms()]

    @property
    def measures_correctness(self) -> bool:
        """Whether a term of the reward measures correctness; if not, there is no accuracy."""
        return any(term.measures_correctness for term in self.reward_terms())

    # ---- prompts

    def encode(self, prompt: Prompt, begun: Sequence[Message] = ()) -> list[int]:
        """Token ids of a prompt, rendered by the chat template if it has messages.

        The prompt of an episode also has the tools, and the environment's first messages (`begun`).
        """
        if self.episodes is not None:
            return self.episodes.turns.first(prompt, begun)[0]
        return self.policy.pretrained.encoder.encode(prompt)

    @property
    def limits(self) -> dict[str, int]:
        """The options that limit a completion, with their values: of a message and, with an environment, of a whole episode."""
        message = {"model.sampler.max_new_tokens": self.sampler.max_new_tokens}
        return message if self.episodes is None else message | {"model.episodes.max_tokens": self.episodes.limits.max_tokens}

    @property
    def max_completion_tokens(self) -> int:
        """Tokens of the longest completion: a message or a whole episode."""
        return list(self.limits.values())[-1]

    def check_encoding(self, prompts: Sequence[Prompt]) -> None:
        """Check that the first prompt of each set can be rendered and tokenized, and that there is room for all completions.

        Raises:
            ConfigError: If a prompt with its longest completion is too long for the model, or for the engine.
        """
        limit, name = self.sampler.context(self.policy.pretrained.config)
        self.check_lengths(prompts, math.inf if self.reward is None else limit, name)  # without a reward nothing is completed
        if self.episodes is not None:
            self.episodes.turns.check(prompts, self.episodes.environment.added_roles())

    def check_lengths(self, prompts: Sequence[Prompt], limit: float, name: str, seen: str = "", shorten: str = "") -> None:
        """Raise ConfigError if a prompt with its longest completion has more tokens than `limit`.

        In the message, `name` is the name of the limit, `seen` follows "too long", and `shorten` replaces the remedy
        `data.max_prompt_tokens`.
        """
        firsts = {prompt.set_name: prompt for prompt in reversed(prompts)}
        tokens = {name: len(self.encode(prompt)) for name, prompt in firsts.items()}
        option, longest = list(self.limits.items())[-1]
        room = limit - longest
        # A text has no more tokens than bytes, and the first prompt already includes what the template adds.
        unsure = [prompt for prompt in prompts if tokens[prompt.set_name] + _text_bytes(prompt) > room]
        lengths = [len(self.encode(prompt)) for prompt in unsure]
        long = [place for place, length in enumerate(lengths) if length > room]
        if not long:
            return
        first, most, remedies = long[0], int(limit) - max(lengths), [shorten] if shorten else []
        if len(long) < len(prompts) and not shorten:
            remedies += [f"set data.max_prompt_tokens={room:g} to drop them"]
        if most > 0:
            remedies += [f"lower {option} to {most} or less"]
        raise ConfigError(
            f"{len(long)} of {len(prompts)} prompts are too long{seen}, first {unsure[first].place} with {lengths[first]} tokens"
            f": {option}={longest} leaves {max(0, int(room))} of {name}; "
            f"{', or '.join(remedies) or 'give shorter prompts, or use another model'}"
        )

    # ---- engines with their own weights

    def update(self, ahead: bool = False) -> None:
        """Give the engines of several processes the policy's current weights. All ranks must call this.

        Args:
            ahead: Whether completions in progress for a later rollout may continue with the new weights, if the engine allows
                it; if not, the update first waits for them.

        Raises:
            RolloutError: If the update fails on one rank.
        """
        if self.sampler.needs_weight_sync and world_size() > 1:  # in one process `begin` does it
            self._give(together=True, ahead=ahead)

    def shut_down(self) -> None:
        """End completions in progress, and any rollout engine and environment processes that this process has started."""
        for future in self._under_way:
            future.cancel()
        self._under_way = []
        if self._ahead is not None:
            self._ahead.shut_down()
        self.sampler.shut_down()
        if self.episodes is not None:
            self.episodes.shut_down()

    def metrics(self) -> dict[str, float]:
        """Measurements of the last rollout; empty if the policy itself makes the completions.

        - `sampling/weights_update_s`: duration of the engine's last update.
        - `sampling/waited_s`: time that training waited for the completions of a remote engine.
        - `sampling/engine_idle_s`: time that a remote engine was idle before the last requests.
        - `sampling/mismatch/...`: the engine's distance from the policy (see `Agreement`).
        """
        sampler, found = self.sampler, {"sampling/weights_update_s": self.update_seconds, **self._agreement.metrics}
        if sampler.is_remote:
            found |= {"sampling/waited_s": self.waited_seconds, "sampling/engine_idle_s": sampler.idle_seconds}
        return found if sampler.needs_weight_sync else {}

    def check(self) -> None:
        """Raise ConfigError if the engine cannot sample for this policy, before time is spent on the run."""
        plan = self.policy.plan
        if plan is not None:
            self.sampler.check_adapter(bool(plan.full_modules), plan.lora.use_dora, plan.ranks, plan.has_experts)
        if self.sampler.needs_weight_sync:
            self.sampler.check_model(self._served_model)

    def _give(self, together: bool, ahead: bool) -> None:
        """Update the engine of this rank. If all ranks call it (`together`), a failure on one rank is raised on all."""
        policy, sampler, run, began = self.policy, self.sampler, self.run, time.perf_counter()
        before, stopping = sampler.version, self.run.stopping_together if together else nullcontext
        weights, model = self._current_weights(), self._served_model
        failure: Exception | None = None
        waits = sampler.is_remote and not (ahead and sampler.inflight_updates)
        if waits:
            with stopping(), run.interruptible():
                for future in self._under_way:
                    future.wait()
            self._under_way = []
        with sampler.updating():
            if sampler.is_remote and not waits:
                sampler.accept_weights(weights.version)
                if together:
                    gather_objects(None)  # the other ranks are at the same point
            everything = self._all_need(weights, model) if policy.weights.sharded else None
            # Servers that do not answer are retried for minutes, and a signal may arrive meanwhile. It must not interrupt a
            # gathering of all ranks.
            may_stop = sampler.is_remote and not policy.weights.sharded
            with stopping(), run.interruptible() if may_stop else nullcontext():
                try:
                    sampler.update(weights, model, everything)
                except Exception as error:
                    failure = error
            if sampler.version != before:
                self.update_seconds = time.perf_counter() - began
            if together:
                self.run.fail_together(failure)
            elif failure is not None:
                raise failure

    def _current_weights(self) -> PolicyWeights:
        from hybrid_lightning.model.current_weights import CurrentWeights  # with PEFT, which is slow to import

        policy, run, merges = self.policy, self.run, not self.sampler.sends_adapter
        return CurrentWeights(policy.model, policy.weights, policy.base_description, run.step, run.rank == 0, merges)

    def _give_again(self) -> None:
        """Give the current weights to an engine that was restarted in the middle of a rollout, so that it can continue.

        Raises:
            RolloutError: If the update fails, or if there are several ranks, which would need to update together.
        """
        sampler = self.sampler
        if sampler.has_lost_weights:
            if world_size() > 1:
                raise RolloutError(
                    "the vLLM servers were restarted in the middle of a rollout, and several devices cannot send them weights at "
                    "that point; resume the run"
                )
            with sampler.updating():
                sampler.update(self._current_weights(), self._served_model)

    def _all_need(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether some rank's engine needs all weights. All ranks must call this, since they then gather the same weights."""
        sampler, needed = self.sampler, False
        with self.run.stopping_together(), self.run.interruptible():
            needed = (weights.is_sender or not sampler.is_remote) and sampler.needs_everything(weights, model)
        return any(gather_objects(needed))

    @property
    def _is_behind(self) -> bool:
        """Whether the engine has no weights yet, or weights of an earlier step."""
        version = self.sampler.version
        return version is None or version.step != self.run.step

    @property
    def _is_alone(self) -> bool:
        """Whether this rank completes prompts without the others, as the first rank does in calibration."""
        alone = not self.sampler.is_remote or self.run.rank == 0
        return alone and self._is_behind and not self.policy.weights.sharded

    @property
    def _served_model(self) -> ServedModel:
        pretrained, device = self.policy.pretrained, self.run.device or next(self.policy.model.parameters()).device
        with self.policy.precision():
            dtype = autocast_dtype(device) or DTYPES[pretrained.dtype]
        model = ServedModel(pretrained.config, pretrained.tokenizer, self._folder, dtype, device, self.run.is_resumed)
        plan = self.policy.plan
        if plan is None:
            return model
        kinds = sorted({name.rpartition(".")[2] for name in plan.lora_modules})
        return replace(model, lora_rank=max(plan.ranks, default=0), lora_modules=tuple(kinds))

    @cached_property
    def _folder(self) -> str | None:
        """Folder from which an engine can read the start policy's weights; None if no folder holds them unchanged."""
        source = self.policy.pretrained.source
        if source.adapter is not None or "gguf_file" in source.arguments or self.policy.quantization is not None:
            return None
        if not source.on_hub:
            return str(source.location)
        config = cached_file(source.location, "config.json", local_files_only=True, **source.arguments)
        assert config is not None, "the policy has been loaded, so its files are here"
        return str(Path(config).parent)


def _text_bytes(prompt: Prompt) -> int:
    texts = [prompt.text or "", *(str(message["content"]) for message in prompt.messages or ())]
    return sum(len(text.encode()) for text in texts)


def repeat_prompts(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """The prompt of each completion, for `samples` completions of every prompt in prompt-major order."""
    return [prompt for prompt in prompts for _ in range(samples)]

"""`EngineGeneration`: completions by a rollout engine that has a copy of the policy's weights.

    update    gives the engine the weights that training has changed
    begin     begins to complete prompts with the current weights; the result records which weights made it

In one process, an engine is updated before it completes prompts, if weights have changed. Several processes update their engines
together before each rollout and each evaluation. Calibration is the exception: the first process runs it, and updates, alone.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.interface import Begun, Draws, PolicyWeights, SamplingRequest, ServedModel
from hybrid_lightning.rollout.rollout_engine import RolloutEngine, WeightedEngine
from hybrid_lightning.runner import autocast_dtype
from hybrid_lightning.sharding.ranks import gather_objects, world_size
from hybrid_lightning.training.agreement import SEQUENCES, Agreement
from hybrid_lightning.training.generation import Generation, Listen, OwnGeneration
from hybrid_lightning.types import Completion, Prompt, Rollout


class EngineGeneration(Generation):
    """Completes prompts with an engine that has a copy of the weights.

    Args:
        policy: See `Generation`, like other arguments.
        sampler: The engine.
        rollouts_ahead: See `RolloutSchedule`.
    """

    sampler: WeightedEngine

    def __init__(self, policy: Policy, sampler: WeightedEngine, *arguments: Any, rollouts_ahead: int = 0, **options: Any) -> None:
        super().__init__(policy, sampler, *arguments, **options)
        self.inflight_updates = sampler.is_remote and rollouts_ahead > 1
        self._agreement = Agreement(self.policy, sampler, self.run)
        self._under_way: list[Begun[Rollout]] = []  # completions with the engine's current weights
        self.update_seconds = 0.0  # duration of the last update
        self.waited_seconds = 0.0  # wait for the last finished completions

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        draws: Draws,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
        listen: Listen | None = None,
        ahead: bool = False,
    ) -> Begun[Rollout]:
        """Begin to complete prompts; in one process, after an update (see `Generation`)."""
        sampler = self.sampler
        if world_size() == 1 or self._is_alone:
            self._give(together=False, ahead=ahead)
        if self._is_behind:
            raise RolloutError(
                "the rollout engine has other weights than the policy; call generation.update() on all processes before "
                "completing prompts"
            )
        request = SamplingRequest(prompts, (), samples_per_prompt, draws, greedy, self._stops, on_token=self._tell)
        request = replace(request, on_completion=on_completion)
        waits = not self._still_under_way()
        if self._compares:
            self._agreement.begin(lambda: map(self._fixed_tokens, prompts[:SEQUENCES]))
        with self.run.interruptible(), self.policy.inference():
            request, seeds = self._prepared(request, listen)
            begun = self.player.begin(sampler, self.policy.runner, request, seeds)
        if sampler.is_remote:
            self._under_way = [*self._still_under_way(), begun]
        if self._compares:
            self._agreement.end(waits)
        if sampler.is_remote:
            # The engine works elsewhere, so a signal leaves no other rank waiting.
            begun = begun.within(self.run.interruptible)
        step = self.run.step
        return begun.then(lambda rollout: self._finished(rollout, begun.waited_s, step))

    def _finished(self, rollout: Rollout, waited_s: float, step: int) -> Rollout:
        if self.sampler.is_remote:
            self.waited_seconds = waited_s
            self._under_way = self._still_under_way()
        if self._compares:
            self._agreement.end()
        return self._by_weights_of(rollout, step)

    @property
    def _compares(self) -> bool:
        """Whether to compare the engine with the policy now.

        A split policy computes on all ranks together, and only in training do all ranks complete prompts equally often.
        """
        return not self.policy.weights.sharded or self.run.is_training

    def _fixed_tokens(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt with its reference answer, no longer than a prompt with its longest completion."""
        ids, answer = self.encode(prompt), []
        if prompt.answer is not None:
            with suppress(Exception):  # a tokenizer without an "unknown" token raises a private exception class
                answer = list(self.policy.pretrained.tokenizer(str(prompt.answer), add_special_tokens=False)["input_ids"])
        return [*ids, *answer][: len(ids) + self.sampler.max_new_tokens - 1]

    def _still_under_way(self) -> list[Begun[Rollout]]:
        return [begun for begun in self._under_way if not begun.done()]

    def _tell(self, running: int, decoded: int) -> None:
        self._give_again()
        super()._tell(running, decoded)

    # ---- weights

    def update(self, ahead: bool = False) -> None:
        """See `Generation`."""
        if world_size() > 1:  # in one process `begin` does it
            self._give(together=True, ahead=ahead)

    def gather_again(self, times: int) -> None:
        """Do nothing: ranks gather weights in `update` alone."""

    def shut_down(self) -> None:
        """See `Generation`."""
        for future in self._under_way:
            future.cancel()
        self._under_way = []
        self.sampler.shut_down()
        super().shut_down()

    def metrics(self) -> dict[str, float]:
        """Measurements of the last rollout.

        - `sampling/weights_update_s`: duration of the engine's last update.
        - `sampling/waited_s`: time that training waited for the completions of a remote engine.
        - `sampling/engine_idle_s`: time that a remote engine was idle since the last call.
        - `sampling/mismatch/...`: the engine's distance from the policy (see `Agreement`).
        """
        sampler, found = self.sampler, {"sampling/weights_update_s": self.update_seconds, **self._agreement.metrics}
        if sampler.is_remote:
            found |= {"sampling/waited_s": self.waited_seconds, "sampling/engine_idle_s": sampler.take_idle_seconds()}
        return found

    @property
    def doubt(self) -> str:
        """See `Generation`."""
        return "; ".join(self._agreement.doubts.values())

    @property
    def agreed(self) -> dict[str, float]:
        """See `Generation`."""
        return self._agreement.lowest

    def check(self) -> None:
        """See `Generation`."""
        plan = self.policy.plan
        if plan is not None:
            self.sampler.check_adapter(bool(plan.full_modules), plan.lora.use_dora, plan.ranks, plan.has_experts)
        self.sampler.check_model(self._served_model)

    def _give(self, together: bool, ahead: bool) -> None:
        """Update the engine of this rank. If all ranks call it (`together`), a failure on one rank is raised on all."""
        policy, sampler, run, began = self.policy, self.sampler, self.run, time.perf_counter()
        before, stopping = sampler.version, self.run.stopping_together if together else nullcontext
        weights, model = self._current_weights(), self._served_model
        failure: Exception | None = None
        waits = sampler.is_remote and not (ahead and self.inflight_updates)
        if waits:
            with stopping(), run.interruptible():
                for future in self._still_under_way():  # others that failed have told those who asked for them
                    future.wait()
            self._under_way = []
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
                sampler.update(weights, model, everything, self.inflight_updates)
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
            sampler.update(self._current_weights(), self._served_model, keeps_requests=True)

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


def generation_of(policy: Policy, sampler: RolloutEngine, *arguments: Any, rollouts_ahead: int = 0, **options: Any) -> Generation:
    """The generation for a kind of engine; other arguments as of `Generation`."""
    if isinstance(sampler, WeightedEngine):
        return EngineGeneration(policy, sampler, *arguments, rollouts_ahead=rollouts_ahead, **options)
    return OwnGeneration(policy, sampler, *arguments, **options)

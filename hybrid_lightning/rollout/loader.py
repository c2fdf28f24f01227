"""`RolloutLoader`: the train dataloader, which yields the micro-batches of rollouts.

Axes: P prompts per rollout over all ranks, G episodes per prompt. A minibatch and a micro-batch consist of whole episodes,
however many rows these have.

The dataloader generates completions, so that `training_step` has only the loss, under Lightning's automatic optimisation, and
every Trainer flag keeps its meaning. One *rollout* is P prompts with G completions each. It is consumed as

    epochs_per_rollout x minibatches_per_rollout x accumulate_grad_batches   micro-batches.

One minibatch is one optimizer step. The denominators of the loss count the whole optimizer step, over its micro-batches and over
all ranks: how a step is split never changes the gradient.

With `rollouts_ahead` k, rollout r + k begins before rollout r is trained on, with the weights of that moment:

    k = 0      begin 0   train 0   begin 1   train 1   begin 2   train 2   ...
    k = 1      begin 0, begin 1    train 0   begin 2   train 1   begin 3   train 2   ...

A remote engine makes completions during training; any other engine computes the same schedule in turns. Rollouts are trained on
in the order in which they began. None is dropped, and none begins unless the run will train on it.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hybrid_lightning.errors import ConfigError, HybridLightningError, RolloutError
from hybrid_lightning.rollout.batching import (
    batch_from_state,
    batch_to_state,
    batches_of_rank,
    rollout_from_state,
    rollout_of_rank,
    rollout_to_state,
)
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import Begun
from hybrid_lightning.rollout.prompt_order import PromptCursor, prompts_digest
from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state
from hybrid_lightning.shared.stopping import RunStopped
from hybrid_lightning.types import PolicyBatch, Prompt, Rollout

DrawPrompts = Callable[[int], Sequence[Prompt]]


class LoaderRun(Protocol):
    """The interface of the run that trains on the loader's micro-batches (see `Run`)."""

    rank: int
    world_size: int
    device: torch.device | None
    steps_left: float
    accumulate_grad_batches: int

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks. All ranks have to call it."""

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """The values of all ranks. All ranks have to call it."""

    def restart_epoch(self) -> None:
        """Count the micro-batches of the epoch from 0: called when a resumed run finds other training prompts."""


class RolloutSource(Protocol):
    """Makes rollouts, and computes what the update needs beforehand: the training task."""

    needs_all_rows: bool = True  # whether the update needs rows without advantage, too
    plays_elsewhere: bool = False  # whether rollouts that were begun are made while this process continues

    @abstractmethod
    def begin(self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None) -> Begun[Any]:
        """Begin to complete prompts with the current weights. An engine in this process has completed them when this returns.

        Args:
            prompts: The prompts of this rank: number `rank` of the rollout, and every `world_size`-th prompt after it.
            generator: Random generator, in the same state on every rank; it must be in the same state again afterwards.
            draw_more: Draws this rank's part of the next prompts in the order, given their number over all ranks; all ranks draw
                the same number. None if only `prompts` may be used.

        Returns:
            What `finish` takes; all ranks request the result together.
        """

    @abstractmethod
    def finish(self, begun: Any, number: int) -> list[PolicyBatch]:
        """The minibatches of a rollout, each with this rank's rows of an optimizer step and the step's denominators.

        Args:
            begun: The result of `begin`.
            number: Number of the rollout in the run.
        """

    @abstractmethod
    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Compute what must be known about the micro-batches of an optimizer step before the rollout's first step.

        Adds `old_logprobs` (unless the step is exactly on-policy), and `ref_logprobs` and `policy_mask` (if they are needed). All
        ranks call it together.
        """


@dataclass(frozen=True)
class RolloutSchedule:
    """How rollouts are drawn and consumed.

    Args:
        prompts_per_rollout: P, over all ranks.
        samples_per_prompt: G.
        minibatches_per_rollout: Number of optimizer steps in one pass over a rollout.
        epochs_per_rollout: Number of passes over a rollout.
        rollouts_ahead: Number of rollouts (k) by which a rollout begins before its training.
    """

    prompts_per_rollout: int
    samples_per_prompt: int
    minibatches_per_rollout: int = 1
    epochs_per_rollout: int = 1
    rollouts_ahead: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, least = getattr(self, entry.name), 0 if entry.name == "rollouts_ahead" else 1
            if value < least:
                raise ConfigError(f"model.{entry.name} must be at least {least}, got {value}")

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs_per_rollout * self.minibatches_per_rollout

    def check_prompts(self, available: int) -> None:
        """Raise ConfigError if there are not enough training prompts for one rollout."""
        if available < self.prompts_per_rollout:
            raise ConfigError(
                f"model.prompts_per_rollout={self.prompts_per_rollout} is more than the {available} training prompts; "
                "lower it or give more data"
            )

    def check_split(self, accumulate_grad_batches: int, world_size: int) -> None:
        """Raise ConfigError unless every micro-batch of every rank gets the same number of episodes."""
        if accumulate_grad_batches < 1:
            raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        if self.prompts_per_rollout % world_size:
            raise ConfigError(
                f"model.prompts_per_rollout={self.prompts_per_rollout} must be a multiple of the {world_size} devices"
            )
        rows = self.prompts_per_rollout // world_size * self.samples_per_prompt
        parts = self.minibatches_per_rollout * accumulate_grad_batches
        if rows % parts:
            raise ConfigError(
                f"{rows} completions per rollout and device (model.prompts_per_rollout x model.samples_per_prompt / devices) "
                f"cannot be split evenly into {parts} micro-batches (model.minibatches_per_rollout="
                f"{self.minibatches_per_rollout} x trainer.accumulate_grad_batches={accumulate_grad_batches}); change one"
            )


class _Position(NamedTuple):
    """Position in the drawing of prompts and of random numbers."""

    prompts: tuple[int, int]  # see `PromptCursor`
    generator: Tensor  # state of the generator
    rollouts: int  # number of the next rollout


class _Ahead(NamedTuple):
    """A rollout that has begun and is not trained on yet."""

    before: _Position  # before it was begun
    minibatches: RolloutFuture[list[PolicyBatch]]  # without the results of `add_logprobs`; all ranks request it together


class RolloutLoader:
    """Iterable of `PolicyBatch` micro-batches, with a length and a state to resume from.

    The order of the prompts is a new permutation for each pass over them, or draws from sets in proportion to their weights (see
    `PromptOrder`). It depends only on `seed` and the number of the pass. The last prompts of a pass are left out if they do not
    fill a rollout. An epoch has as many rollouts as fit into one pass. With `DynamicSampling`, rollouts draw more prompts, so a
    pass over the prompts ends before the epoch.

    Args:
        prompts: The training prompts, the same on every rank.
        source: Makes rollouts: the training task.
        schedule: Sizes of rollouts and minibatches.
        run: The run that trains on them. Each of its ranks takes its own P / `world_size` prompts of every rollout.
        generator: Random generator for sampling, on the CPU and the same on every rank; its state is part of `state_dict`, so
            that a run can continue on another kind of device.
        seed: Seed of the prompt order.
        epoch: Number of the first epoch, for a loader that replaces another (`reload_dataloaders_every_n_epochs`).
        shuffle: False keeps the order of the data (for `overfit_batches`), starts again at every epoch, and never draws more
            prompts for a rollout, since these would not be the ones to overfit.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        source: RolloutSource,
        schedule: RolloutSchedule,
        run: LoaderRun,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
    ) -> None:
        schedule.check_prompts(len(prompts))
        schedule.check_split(run.accumulate_grad_batches, run.world_size)
        self.prompts, self.source, self.schedule, self.run = list(prompts), source, schedule, run
        self.generator, self.shuffle = generator or torch.Generator(), shuffle
        self._cursor = PromptCursor(self.prompts, seed, epoch, shuffle, run.rank, run.world_size)
        self._rollouts = epoch * (len(prompts) // schedule.prompts_per_rollout)  # number of the next rollout
        self._pending: deque[PolicyBatch] = deque()
        self._ahead: deque[_Ahead] = deque()
        self._taken: list[PolicyBatch] = []  # micro-batches of the current optimizer step, or of the last one
        self._random_before: dict[str, Any] = {}  # the random state before the first of these micro-batches
        self._resumed_random_state: dict[str, Any] | None = None
        self._resumed = False

    def __len__(self) -> int:
        """Number of micro-batches in an epoch; with a length Lightning does not prefetch, which would use a stale policy."""
        rollouts = len(self.prompts) // self.schedule.prompts_per_rollout
        return rollouts * self.micro_batches_per_rollout

    @property
    def micro_batches_per_rollout(self) -> int:
        """Number of micro-batches that one rollout yields."""
        return self.schedule.steps_per_rollout * self.run.accumulate_grad_batches

    def __iter__(self) -> Iterator[PolicyBatch]:
        """Yield the micro-batches of an epoch, starting where the last iteration stopped.

        So if an epoch is cut short (`limit_train_batches`, a stop, a resume), the rest of its rollout is not lost. The exception
        is an epoch that ended in the middle of an optimizer step: Lightning has already made that step with its micro-batches so
        far, so the rest of the step is dropped.
        """
        self._taken = []  # if an epoch ended in the middle of a step, Lightning has made that step
        if not self._resumed:
            if not self.shuffle:
                self._cursor.position, self._pending = (self._cursor.position[0], 0), deque()
            for _ in range(len(self._pending) % self.run.accumulate_grad_batches):
                self._pending.popleft()
        for _ in range(len(self)):
            if self._resumed_random_state is not None:
                restore_random_state(self._resumed_random_state)
                self._resumed_random_state = None
            self._resumed = False
            if not self._pending:
                self._pending = self._roll_out()
            if len(self._taken) >= self.run.accumulate_grad_batches or not self._taken:
                self._taken, self._random_before = [], capture_random_state()
            self._taken.append(self._pending.popleft())
            yield self._taken[-1]

    def give_back(self, count: int) -> None:
        """Take back all `count` micro-batches of an optimizer step that will not be finished now.

        The random states before the step are restored, too.
        """
        if count:
            assert count == len(self._taken), f"{count} of {len(self._taken)} micro-batches of a step are given back"
            self._pending.extendleft(reversed(self._taken))
            self._taken = []
            self._resumed_random_state, self._resumed = self._random_before, True

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompt order, and for each rank its remaining micro-batches, their rollouts and all random states.

        It is plain data and tensors. Saving waits for the completions of rollouts ahead. If a stop of the run was requested, or
        its engine failed, the resumed run begins them again. All ranks must call this together.
        """
        places, ahead, now = [], [], self._position
        # Errors that prevent a rollout, but must not prevent a checkpoint. With several ranks: errors that all ranks raise.
        put_off = RunStopped, RolloutError if self.run.world_size > 1 else HybridLightningError
        for entry in self._ahead:
            try:
                ahead.append(entry.minibatches.result())
                places.append(list(entry.before.prompts))
            except put_off:  # raised again when the rollout is needed
                now = entry.before
                break
        kept = [*self._pending, *(batch for minibatches in ahead for batch in minibatches)]
        numbers = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        scored = {batch.rollout_number: batch.rollout for batch in kept if batch.rollout is not None}
        mine = {
            "pending": [batch_to_state(batch) for batch in self._pending],
            "ahead": [[batch_to_state(batch) for batch in minibatches] for minibatches in ahead],
            "rollouts": {number: rollout_to_state(rollout, numbers) for number, rollout in scored.items()},
            "generator": now.generator,
            "random": self._resumed_random_state or capture_random_state(),
        }
        return {
            "ahead": places,
            "prompts": len(self.prompts),
            "digest": self._prompts_digest,
            "shuffle": self.shuffle,
            "epoch": now.prompts[0],
            "next_prompt": now.prompts[1],
            "next_rollout": now.rollouts,
            "ranks": self.run.gather_over_ranks(mine),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        A different number of ranks distributes the remaining rows among themselves, and continues with the same completions.
        If the training prompts have changed, they are drawn from the beginning of their order, and the rest of the old rollout is
        dropped. The rollout is also dropped if the state contains `given_up`; the prompts of rollouts ahead are then drawn again.
        """
        same = state["digest"] == self._prompts_digest and state["shuffle"] == self.shuffle
        given_up = state.get("given_up", False)
        epoch, next_prompt = state["ahead"][0] if given_up and state["ahead"] else (state["epoch"], state["next_prompt"])
        self._cursor.position = (epoch, next_prompt if same else 0)
        self._rollouts = state["next_rollout"]
        saved: list[dict[str, Any]] = state["ranks"]
        self._pending, self._ahead = deque(), deque()
        if same and not given_up:
            self._load_batches(saved, state["ahead"])
        else:
            self.run.restart_epoch()
        if not same:
            rank_zero_info(
                f"the checkpoint was saved with other training prompts ({state['prompts']}, now {len(self.prompts)}), or another "
                "kind of order: training starts at the beginning of the new order, and the rollout in progress is dropped"
            )
        self.generator.set_state(saved[0]["generator"].cpu())
        if self.run.rank < len(saved):
            self._resumed_random_state = saved[self.run.rank]["random"]
        self._resumed = True

    def _load_batches(self, saved: list[dict[str, Any]], places: list[list[int]]) -> None:
        rank, ranks, device = self.run.rank, self.run.world_size, self.run.device or torch.device("cpu")
        scored: dict[int, Rollout] = {}
        for number in saved[0]["rollouts"]:
            parts = [rollout_from_state(one["rollouts"][number], self.prompts, device) for one in saved]
            scored[number] = rollout_of_rank(parts, rank, ranks)

        def own(parts: list[list[dict[str, Any]]]) -> list[PolicyBatch]:
            batches = [[batch_from_state(entry).to(device) for entry in of_rank] for of_rank in parts]
            mine = batches_of_rank(batches, rank, ranks)
            return [replace(batch, rollout=scored.get(batch.rollout_number)) for batch in mine]

        self._pending.extend(own([one["pending"] for one in saved]))
        first, generator = self._rollouts - len(places), saved[0]["generator"].cpu()
        for number, (epoch, start) in enumerate(places):
            before = _Position((epoch, start), generator, first + number)
            minibatches = own([one["ahead"][number] for one in saved])
            self._ahead.append(_Ahead(before, RolloutFuture.of(minibatches)))

    @cached_property
    def _prompts_digest(self) -> str:
        return prompts_digest(self.prompts)

    @property
    def _position(self) -> _Position:
        return _Position(self._cursor.position, self.generator.get_state(), self._rollouts)

    def _roll_out(self) -> deque[PolicyBatch]:
        """The micro-batches of the next rollout; the rollouts ahead of it begin first."""
        before, ahead, random = self._position, list(self._ahead), capture_random_state()
        try:
            most, steps = self.schedule.rollouts_ahead, self.schedule.steps_per_rollout
            while not self._ahead or (len(self._ahead) <= most and len(self._ahead) * steps < self.run.steps_left):
                if self._ahead:
                    self._ahead[0].minibatches.wait()
                start, prompts = self._position, self._cursor.draw(self.schedule.prompts_per_rollout)
                begun = self.source.begin(prompts, self.generator, self._cursor.draw if self.shuffle else None)
                self._rollouts += 1
                # `finish` runs when the result is requested: for an engine in this process at once, for another in its turn.
                self._ahead.append(_Ahead(start, begun.then(partial(self.source.finish, number=start.rollouts))))
                if not self.source.plays_elsewhere:
                    self._ahead[-1].minibatches.result()
            batches = self._micro_batches(self._ahead[0].minibatches.result())
        except BaseException:
            # After a stop during generation, restore the state of the last optimizer step. A run that resumes from a checkpoint
            # saved now begins these rollouts again.
            for entry in list(self._ahead)[len(ahead) :]:
                entry.minibatches.cancel()
            self._ahead = deque(ahead)
            self._cursor.position, self._rollouts = before.prompts, before.rollouts
            self.generator.set_state(before.generator)
            restore_random_state(random)
            raise
        self._ahead.popleft()
        return batches

    def _micro_batches(self, minibatches: Sequence[PolicyBatch]) -> deque[PolicyBatch]:
        """The micro-batches of all passes over a rollout, with the values that the update needs, under the current weights."""
        accumulate, epochs = self.run.accumulate_grad_batches, self.schedule.epochs_per_rollout
        self.schedule.check_split(accumulate, self.run.world_size)
        one_pass: list[PolicyBatch] = []
        for step, minibatch in enumerate(minibatches):
            # Until the first optimizer step the policy's log-probabilities are the old ones. With several passes over the
            # rollout, the first step's micro-batches come again later, so they need old log-probabilities, too.
            on_policy = step == 0 and epochs == 1
            one_pass.extend(self.source.add_logprobs(minibatch.split(accumulate), on_policy))
        return deque(one_pass * epochs)

"""`RolloutLoader`: the train dataloader, which yields the micro-batches of rollouts.

Axes: P prompts per rollout over all ranks, G completions per prompt, B rows of this rank, T completion tokens.

Completions are generated in the dataloader, so that `training_step` is a pure loss under Lightning's automatic optimisation, and
every Trainer flag keeps its meaning. One *rollout* is P prompts with G completions each. It is consumed as

    epochs_per_rollout x minibatches_per_rollout x accumulate_grad_batches   micro-batches.

One minibatch is one optimizer step. The denominators of the loss are those of the whole optimizer step, over its micro-batches
and over all ranks: how a step is split never changes the gradient.

With `rollouts_ahead` k, rollout r + k is begun before rollout r is trained on, with the weights of that moment:

    k = 0      begin 0   train 0   begin 1   train 1   begin 2   train 2   ...
    k = 1      begin 0, begin 1    train 0   begin 2   train 1   begin 3   train 2   ...

An engine whose completions are made elsewhere makes them meanwhile; of another the same schedule is computed in turns. Rollouts
are trained on in the order in which they were begun, none is dropped, and none is begun that the run will not train on.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hybrid_lightning.errors import ConfigError, HybridLightningError, RolloutError
from hybrid_lightning.rollout.batching import batch_from_state, batch_to_state, batches_of_rank
from hybrid_lightning.rollout.prompt_order import PromptCursor, prompts_digest
from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state
from hybrid_lightning.rollout.rollout_engine import Begun
from hybrid_lightning.stopping import RunStopped
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

DrawPrompts = Callable[[int], Sequence[Prompt]]


@dataclass(frozen=True)
class TrainedRollout:
    """This rank's part of a rollout, to be trained on."""

    sequences: Sequences  # B, which is G times the number of this rank's prompts, whatever else was sampled
    sampling_logprobs: Tensor  # [B, T] log-probabilities as the sampler computed them
    advantages: Tensor  # [B]; or [B, T] with credit by turn, 0 where nothing was sampled
    metrics: dict[str, float] = field(default_factory=dict)  # to log with each step of the rollout
    counted: Tensor | None = None  # [B] bool: rows that count as sequences (see `Rewards`); None: all, on all ranks


class RolloutSource(Protocol):
    """Makes rollouts, and computes what the update must know beforehand. `PolicyModule` is one."""

    @abstractmethod
    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> TrainedRollout:
        """Complete prompts and score the completions.

        Args:
            prompts: The prompts of this rank: number `rank` of the rollout, and every `world_size`-th prompt after it.
            generator: Random generator, in the same state on every rank; it must be in the same state again afterwards.
            draw_more: Draws this rank's part of the next prompts in the order, given their number over all ranks; all ranks draw
                the same number. None if only `prompts` may be used.
        """

    def begin(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> Begun[TrainedRollout]:
        """`roll_out` for a rollout that is trained on later: with the weights of now, at once or while other things are done."""
        rollout = self.roll_out(prompts, generator, draw_more)
        return Begun(lambda: rollout)

    @abstractmethod
    def takes_part(self, advantages: Tensor) -> Tensor:
        """[B] bool, True for the rows that take part in the update, from the advantages of a `TrainedRollout`."""

    @abstractmethod
    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Compute what must be known about the micro-batches of one optimizer step before the step begins.

        That is `old_logprobs` (unless the step is exactly on-policy), and `ref_logprobs` and `policy_mask` (if they are needed).
        All ranks call it together.
        """


@dataclass(frozen=True)
class RolloutSchedule:
    """How rollouts are drawn and consumed.

    Args:
        prompts_per_rollout: P, over all ranks.
        samples_per_prompt: G.
        minibatches_per_rollout: Number of optimizer steps in one pass over a rollout.
        epochs_per_rollout: Number of passes over a rollout.
        rollouts_ahead: How many rollouts before its training a rollout is begun (k).
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
        """Optimizer steps that are made from a rollout."""
        return self.epochs_per_rollout * self.minibatches_per_rollout

    def check_prompts(self, available: int) -> None:
        """Raise ConfigError if there are not enough training prompts for one rollout."""
        if available < self.prompts_per_rollout:
            raise ConfigError(
                f"model.prompts_per_rollout={self.prompts_per_rollout} is more than the {available} training prompts; "
                "lower it or give more data"
            )

    def check_split(self, accumulate_grad_batches: int, world_size: int) -> None:
        """Raise ConfigError unless every micro-batch of every rank gets the same number of sequences."""
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
    """Where the drawing of prompts and of random numbers stands."""

    prompts: tuple[int, int]  # see `PromptCursor`
    generator: Tensor  # its state


class _Ahead(NamedTuple):
    """A rollout that was begun and is not trained on yet."""

    before: _Position  # before it was begun
    begun: Begun[list[PolicyBatch]]  # its minibatches, without what `add_logprobs` computes; all ranks finish it together


class RolloutLoader:
    """Iterable of `PolicyBatch` micro-batches, with a length and a state from which it can be resumed.

    The order of the prompts is a new permutation for each pass over them, or draws from sets in proportion to their weights (see
    `PromptOrder`). It depends only on `seed` and the number of the pass. The last prompts of a pass that do not fill a rollout
    are left out. An epoch has as many rollouts as one pass gives; `DynamicSampling` draws more prompts, so that a pass is over
    before the epoch.

    Args:
        prompts: The training prompts, the same on every rank.
        source: Makes rollouts: the policy.
        schedule: Sizes of rollouts and minibatches.
        accumulate_grad_batches: Returns the Trainer's current value, which can change between epochs.
        generator: Random generator for sampling, on the CPU and the same on every rank; its state is part of `state_dict`, with
            which a run can go on on another kind of device.
        seed: Seed of the prompt order.
        rank: Rank of this process.
        world_size: Number of processes; each takes its own P / world_size prompts of every rollout.
        sum_over_ranks: Adds a scalar tensor over processes.
        gather_over_ranks: Returns the values of all processes, for a checkpoint.
        device: Where resumed micro-batches are put: the policy's.
        epoch: Number of the first epoch, for a loader that replaces another (`reload_dataloaders_every_n_epochs`).
        shuffle: False keeps the order of the data (for `overfit_batches`), starts again at every epoch, and never draws more
            prompts for a rollout, since these would not be the ones to overfit.
        on_given_up: Called if the rest of a loaded state's rollout is given up: it was made of other training prompts, in another
            kind of order, or with settings that have changed since.
        steps_left: Returns the optimizer steps that the run will still make, or infinity.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        source: RolloutSource,
        schedule: RolloutSchedule,
        *,
        accumulate_grad_batches: Callable[[], int] = lambda: 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
        gather_over_ranks: Callable[[Any], list[Any]] = lambda value: [value],
        device: torch.device | str = "cpu",
        epoch: int = 0,
        shuffle: bool = True,
        on_given_up: Callable[[], None] = lambda: None,
        steps_left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        schedule.check_prompts(len(prompts))
        schedule.check_split(accumulate_grad_batches(), world_size)
        self.prompts = prompts
        self.source = source
        self.schedule = schedule
        self.accumulate_grad_batches = accumulate_grad_batches
        self.generator, self.device = generator or torch.Generator(), device
        self.rank, self.world_size = rank, world_size
        self.sum_over_ranks, self.gather_over_ranks = sum_over_ranks, gather_over_ranks
        self.shuffle, self.on_given_up, self.steps_left = shuffle, on_given_up, steps_left
        self._cursor = PromptCursor(prompts, seed, epoch, shuffle, rank, world_size)
        self._pending: deque[PolicyBatch] = deque()
        self._ahead: deque[_Ahead] = deque()
        self._taken: list[PolicyBatch] = []  # micro-batches of the current optimizer step, or of the last one
        self._random_before: dict[str, Any] = {}  # the random state before the first of these
        self._resumed_random_state: dict[str, Any] | None = None
        self._resumed = False

    def __len__(self) -> int:
        """Number of micro-batches in an epoch. Because there is a length, Lightning does not prefetch, from a stale policy."""
        rollouts = len(self.prompts) // self.schedule.prompts_per_rollout
        return rollouts * self.micro_batches_per_rollout

    @property
    def micro_batches_per_rollout(self) -> int:
        """Number of micro-batches that one rollout yields."""
        return self.schedule.steps_per_rollout * self.accumulate_grad_batches()

    def __iter__(self) -> Iterator[PolicyBatch]:
        """Yield the micro-batches of an epoch, beginning where the last iteration stopped.

        So if an epoch is cut short (`limit_train_batches`, a stop, a resume), the rest of its rollout is not lost. The exception
        is an epoch that ended in the middle of an optimizer step: Lightning has already made that step with the micro-batches
        that it had, so the rest of the step is dropped.
        """
        self._taken = []  # if an epoch ended in the middle of a step, Lightning has made that step
        if not self._resumed:
            if not self.shuffle:
                self._cursor.position, self._pending = (self._cursor.position[0], 0), deque()
            for _ in range(len(self._pending) % self.accumulate_grad_batches()):
                self._pending.popleft()
        for _ in range(len(self)):
            if self._resumed_random_state is not None:
                restore_random_state(self._resumed_random_state)
                self._resumed_random_state = None
            self._resumed = False
            if not self._pending:
                self._pending = self._roll_out()
            if len(self._taken) >= self.accumulate_grad_batches() or not self._taken:
                self._taken, self._random_before = [], capture_random_state()
            self._taken.append(self._pending.popleft())
            yield self._taken[-1]

    def give_back(self, count: int) -> None:
        """Take back all of the so many micro-batches that an optimizer step has had, since it will not be finished now.

        The random states before it are restored, too.
        """
        if count:
            assert count == len(self._taken), f"{count} of {len(self._taken)} micro-batches of a step are given back"
            self._pending.extendleft(reversed(self._taken))
            self._taken = []
            self._resumed_random_state, self._resumed = self._random_before, True

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompt order, and for each rank its remaining micro-batches and all random states.

        It is plain data and tensors. Rollouts ahead whose completions are under way are waited for; where the run has been asked
        to stop, or its engine has failed, the run that goes on begins them again. All ranks must call this together.
        """
        places, ahead, now = [], [], self._position
        # What keeps a rollout from being made and no checkpoint from being saved: of several ranks, what all of them raise.
        put_off = RunStopped, RolloutError if self.world_size > 1 else HybridLightningError
        for entry in self._ahead:
            try:
                ahead.append([batch_to_state(batch) for batch in entry.begun.finish()])
                places.append(list(entry.before.prompts))
            except put_off:  # raised again when the rollout is needed
                now = entry.before
                break
        mine = {
            "pending": [batch_to_state(batch) for batch in self._pending],
            "ahead": ahead,
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
            "ranks": self.gather_over_ranks(mine),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Another number of ranks distributes the remaining rows among themselves, and goes on to sample the same completions. Other
        training prompts are drawn from the beginning of their order, and the rest of the old rollout is given up. It is given up
        as well if the state says so (`given_up`), and the prompts of rollouts ahead are drawn again.
        """
        same = state["digest"] == self._prompts_digest and state["shuffle"] == self.shuffle
        given_up = state.get("given_up", False)
        epoch, next_prompt = state["ahead"][0] if given_up and state["ahead"] else (state["epoch"], state["next_prompt"])
        self._cursor.position = (epoch, next_prompt if same else 0)
        saved: list[dict[str, Any]] = state["ranks"]

        generator = saved[0]["generator"].cpu()

        def own(parts: list[list[dict[str, Any]]]) -> list[PolicyBatch]:
            batches = [[batch_from_state(entry).to(self.device) for entry in of_rank] for of_rank in parts]
            return batches_of_rank(batches, self.rank, self.world_size)

        self._pending, self._ahead = deque(), deque()
        if same and not given_up:
            self._pending.extend(own([one["pending"] for one in saved]))
            for number, (epoch, start) in enumerate(state["ahead"]):
                minibatches = own([one["ahead"][number] for one in saved])
                self._ahead.append(_Ahead(_Position((epoch, start), generator), Begun(partial(list, minibatches))))
        else:
            self.on_given_up()
        if not same:
            rank_zero_info(
                f"the checkpoint was saved with other training prompts ({state['prompts']}, now {len(self.prompts)}), or another "
                "kind of order: training goes on at the beginning of the new order, and the rollout in progress is given up"
            )
        self.generator.set_state(generator)
        if self.rank < len(saved):
            self._resumed_random_state = saved[self.rank]["random"]
        self._resumed = True

    @cached_property
    def _prompts_digest(self) -> str:
        return prompts_digest(self.prompts)

    @property
    def _position(self) -> _Position:
        return _Position(self._cursor.position, self.generator.get_state())

    def _roll_out(self) -> deque[PolicyBatch]:
        """The micro-batches of the next rollout; those ahead of it are begun before."""
        before, ahead, random = self._position, list(self._ahead), capture_random_state()
        try:
            if not self._ahead:
                self._begin()
            first = self._ahead[0].begun
            first.wait()
            most, steps = self.schedule.rollouts_ahead, self.schedule.steps_per_rollout
            while len(self._ahead) <= most and len(self._ahead) * steps < self.steps_left():
                self._begin()
            batches = self._micro_batches(first.finish())
        except BaseException:
            # After a stop during generation the state is that of the last optimizer step, so that a run which resumes from a
            # checkpoint saved now begins these rollouts anew.
            for entry in list(self._ahead)[len(ahead) :]:
                entry.begun.cancel()
            self._ahead = deque(ahead)
            self._cursor.position = before.prompts
            self.generator.set_state(before.generator)
            restore_random_state(random)
            raise
        self._ahead.popleft()
        return batches

    def _begin(self) -> None:
        before = self._position
        prompts = self._cursor.draw(self.schedule.prompts_per_rollout)
        more = self._cursor.draw if self.shuffle else None
        begun = self.source.begin(prompts, self.generator, more)
        minibatches = cache(lambda: self._minibatches(begun.finish()))  # a checkpoint may need them before training does
        self._ahead.append(_Ahead(before, Begun(minibatches, begun.wait, begun.cancel)))

    def _minibatches(self, rollout: TrainedRollout) -> list[PolicyBatch]:
        """The optimizer steps of one pass over a rollout, with the rows that take part in each."""
        sequences, advantages, counted = rollout.sequences, rollout.advantages, rollout.counted
        rows = len(sequences) // self.schedule.minibatches_per_rollout
        # A completion without tokens adds nothing to any loss. A masked one counts as a sequence, one that is left out does not.
        takes_part = self.source.takes_part(advantages) & sequences.sampled_mask.any(dim=1)
        minibatches: list[PolicyBatch] = []
        for step in range(self.schedule.minibatches_per_rollout):
            of_step = torch.arange(step * rows, (step + 1) * rows, device=advantages.device)
            updated_sequences = self._sum(takes_part[of_step])
            if not updated_sequences:  # some rows, with a gradient of 0, so that the step logs what every step does
                shown = of_step[sequences.sampled_mask[of_step].any(dim=1)]
                takes_part[shown[:: self.schedule.samples_per_prompt]] = True
                updated_sequences = self._sum(takes_part[of_step])
            updated = of_step[takes_part[of_step]]
            whole = PolicyBatch(
                sequences=sequences,
                advantages=advantages,
                sampling_logprobs=rollout.sampling_logprobs,
                old_logprobs=None,
                ref_logprobs=None,
                num_sequences=float(rows * self.world_size) if counted is None else self._sum(counted[of_step]),
                num_tokens=self._sum(sequences.sampled_mask[of_step]),
                updated_sequences=updated_sequences,
                updated_tokens=self._sum(sequences.sampled_mask[updated]),
                metrics=rollout.metrics,
            )
            minibatches.append(whole.rows(updated))
        return minibatches

    def _micro_batches(self, minibatches: Sequence[PolicyBatch]) -> deque[PolicyBatch]:
        """The micro-batches of all passes over a rollout, with what the update has to know, under the weights of now."""
        accumulate, epochs = self.accumulate_grad_batches(), self.schedule.epochs_per_rollout
        self.schedule.check_split(accumulate, self.world_size)
        one_pass: list[PolicyBatch] = []
        for step, minibatch in enumerate(minibatches):
            rows = torch.arange(len(minibatch.sequences), device=minibatch.advantages.device)
            # Until the first optimizer step the policy's log-probabilities are the old ones. If there are further passes over
            # the rollout, the old ones are needed for the first step, too.
            on_policy = step == 0 and epochs == 1
            one_pass.extend(self.source.add_logprobs([minibatch.rows(part) for part in rows.tensor_split(accumulate)], on_policy))
        return deque(one_pass * epochs)

    def _sum(self, values: Tensor) -> float:
        return float(self.sum_over_ranks(values.sum()))

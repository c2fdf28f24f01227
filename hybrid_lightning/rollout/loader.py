"""`RolloutLoader`: rollouts as training data.

The generation happens in the train dataloader, so that `training_step` is a pure loss under Lightning's automatic
optimisation and every Trainer flag keeps its meaning. One *rollout* is P prompts completed G times each; it is consumed as

    epochs_per_rollout x minibatches_per_rollout x accumulate_grad_batches   micro-batches,

one minibatch being one optimizer step. Denominators of the loss are those of the whole optimizer step, over its
micro-batches and over all ranks: how a batch is split never changes the gradient.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.rollout.batching import deal, from_state, to_state
from hybrid_lightning.rollout.prompt_order import PromptCursor, prompts_digest
from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

DrawPrompts = Callable[[int], Sequence[Prompt]]


class RolloutSource(Protocol):
    """Makes rollouts, and what the update of each has to know beforehand."""

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> tuple[Sequences, Tensor, Tensor, dict[str, float]]:
        """Complete and score prompts.

        Args:
            prompts: Of this rank: number `rank` of the rollout's and then each `world_size`-th.
            generator: In the same state on every rank, and to be left so.
            draw_more: Draws this rank's part of so many prompts that come next in the order; all ranks draw the same number. None
                if the rollout has to be of `prompts`.

        Returns:
            Sequences (B), the sampler's log-probabilities [B, T], advantages [B], and metrics to log with each of their steps. B
            is G times the number of `prompts`, whatever else was sampled.
        """
        ...

    def takes_part(self, advantages: Tensor) -> Tensor:
        """[B] bool: the rows that an update needs."""
        ...

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in what is known of the micro-batches of one optimizer step before it begins.

        That is `old_logprobs` (unless the step is exactly on-policy), and `ref_logprobs` and `policy_mask` (if they are needed).
        All ranks call it together.
        """
        ...


@dataclass(frozen=True)
class RolloutSchedule:
    """How rollouts are drawn and consumed.

    Args:
        prompts_per_rollout: P over all ranks.
        samples_per_prompt: G.
        minibatches_per_rollout: Optimizer steps that one pass over a rollout makes.
        epochs_per_rollout: Passes over a rollout.
    """

    prompts_per_rollout: int
    samples_per_prompt: int
    minibatches_per_rollout: int = 1
    epochs_per_rollout: int = 1

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value < 1:
                raise ConfigError(f"model.{entry.name} must be at least 1, got {value}")

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


class RolloutLoader:
    """Iterable of `PolicyBatch` micro-batches with a length and a resumable state.

    The order of prompts is a fresh permutation for each pass over them, or draws from sets in proportion to their weights (see
    `PromptOrder`); the last prompts that do not fill a rollout are left out. It depends on `seed` and the number of the pass
    alone. An epoch has as many rollouts as one pass gives; with `DynamicSampling`, which draws more, passes go by sooner.

    Args:
        prompts: The training prompts, the same on every rank.
        source: Makes rollouts; the policy.
        schedule: Sizes.
        accumulate_grad_batches: Returns the Trainer's current value (it can change between epochs).
        generator: Random generator of the sampling, on the model's device and the same on every rank; its state is part of
            `state_dict`.
        seed: Of the prompt order.
        rank: This process.
        world_size: Number of processes; each takes its own P / world_size prompts of every rollout.
        sum_over_ranks: Adds a scalar tensor over processes.
        gather_over_ranks: Gives the value of every process, for a checkpoint.
        epoch: First epoch: a loader that replaces another (`reload_dataloaders_every_n_epochs`) must not begin anew.
        shuffle: False keeps the order of the data (for `overfit_batches`), starts over at every epoch, and lets no rollout draw
            more prompts, which would not be the ones to overfit.
        on_other_prompts: Called when a state is loaded that was saved with other training prompts, or in another kind of order.
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
        epoch: int = 0,
        shuffle: bool = True,
        on_other_prompts: Callable[[], None] = lambda: None,
    ) -> None:
        schedule.check_prompts(len(prompts))
        schedule.check_split(accumulate_grad_batches(), world_size)
        self.prompts = prompts
        self.source = source
        self.schedule = schedule
        self.accumulate_grad_batches = accumulate_grad_batches
        self.generator = generator or torch.Generator()
        self.rank, self.world_size = rank, world_size
        self.sum_over_ranks, self.gather_over_ranks = sum_over_ranks, gather_over_ranks
        self.shuffle, self.on_other_prompts = shuffle, on_other_prompts
        self._digest: str | None = None  # of the prompts, once it is asked for
        self._cursor = PromptCursor(prompts, seed, epoch, shuffle, rank, world_size)
        self._pending: deque[PolicyBatch] = deque()
        self._taken: list[PolicyBatch] = []  # of the optimizer step that is being made or was made last
        self._random_before: dict[str, Any] = {}  # the random state before the first of them
        self._resumed_random_state: dict[str, Any] | None = None
        self._resumed = False

    def __len__(self) -> int:
        """Micro-batches in an epoch. Having a length keeps Lightning from prefetching a batch of a stale policy."""
        rollouts = len(self.prompts) // self.schedule.prompts_per_rollout
        return rollouts * self.micro_batches_per_rollout

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches that one rollout yields."""
        schedule = self.schedule
        return schedule.epochs_per_rollout * schedule.minibatches_per_rollout * self.accumulate_grad_batches()

    def __iter__(self) -> Iterator[PolicyBatch]:
        """Yield an epoch's number of micro-batches, going on where the last iteration stopped.

        Going on matters when an epoch is cut short (`limit_train_batches`, a stop, a resume): nothing that was paid for with a
        rollout is thrown away. Except what is left of an optimizer step in whose middle an epoch ended: Lightning has made that
        step already, with the micro-batches that it had.
        """
        self._taken = []  # a step in whose middle an epoch ended has been made
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
        """Take micro-batches of an optimizer step back that will not be made now.

        What they used of the random states is given back as well.

        Args:
            count: How many of the step have been yielded; all of them.
        """
        if count:
            assert count == len(self._taken), f"{count} of {len(self._taken)} micro-batches of a step are given back"
            self._pending.extendleft(reversed(self._taken))
            self._taken = []
            self._resumed_random_state, self._resumed = self._random_before, True

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompts, and of each rank its micro-batches not yet consumed and all random states.

        Plain data and tensors. All ranks have to ask for it together.
        """
        mine = {
            "pending": [to_state(batch) for batch in self._pending],
            "generator": self.generator.get_state(),
            "random": self._resumed_random_state or capture_random_state(),
        }
        epoch, next_prompt = self._cursor.position
        prompts = {"prompts": len(self.prompts), "digest": self._prompts_digest(), "shuffle": self.shuffle}
        position = {**prompts, "epoch": epoch, "next_prompt": next_prompt}
        return {**position, "ranks": self.gather_over_ranks(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Another number of ranks takes the rows that are left over among them, and goes on to sample the same completions. Other
        training prompts are drawn from the beginning of their order, and what is left of a rollout of the former is given up.

        Raises:
            CheckpointError: If the state was saved by an earlier version.
        """
        if "ranks" not in state:
            raise CheckpointError("the checkpoint's rollouts were saved by an earlier version; resume with that version")
        same = self._has_same_prompts(state)
        self._cursor.position = (state["epoch"], state["next_prompt"] if same else 0)
        device = self.generator.device
        saved: list[dict[str, Any]] = state["ranks"]
        pending = [[from_state(entry).to(device) for entry in one["pending"]] for one in saved]
        self._pending = deque(deal(pending, self.rank, self.world_size) if same else [])
        if not same:
            rank_zero_info(
                f"the checkpoint was saved with other training prompts ({state['prompts']}, now {len(self.prompts)}), or another "
                "kind of order: training goes on at the beginning of the new order, and the rollout in progress is given up"
            )
            self.on_other_prompts()
        self.generator.set_state(saved[0]["generator"].cpu())
        if self.rank < len(saved):
            self._resumed_random_state = saved[self.rank]["random"]
        self._resumed = True

    def _has_same_prompts(self, state: dict[str, Any]) -> bool:
        if "digest" not in state:  # saved by an earlier version
            return bool(state["prompts"] == len(self.prompts))
        return bool(state["digest"] == self._prompts_digest() and state["shuffle"] == self.shuffle)

    def _prompts_digest(self) -> str:
        self._digest = self._digest or prompts_digest(self.prompts)
        return self._digest

    def _roll_out(self) -> deque[PolicyBatch]:
        before = (self._cursor.position, self.generator.get_state(), capture_random_state())
        try:
            prompts = self._cursor.draw(self.schedule.prompts_per_rollout)
            more = self._cursor.draw if self.shuffle else None
            return deque(self._split(*self.source.roll_out(prompts, self.generator, more)))
        except BaseException:
            # A stop during generation leaves the state at the last optimizer step, so that a checkpoint saved now resumes
            # as if this rollout had never been begun.
            self._cursor.position = before[0]
            self.generator.set_state(before[1])
            restore_random_state(before[2])
            raise

    def _split(
        self, sequences: Sequences, sampling_logprobs: Tensor, advantages: Tensor, metrics: dict[str, float]
    ) -> list[PolicyBatch]:
        accumulate = self.accumulate_grad_batches()
        self.schedule.check_split(accumulate, self.world_size)
        minibatches, epochs = self.schedule.minibatches_per_rollout, self.schedule.epochs_per_rollout
        rows = len(sequences) // minibatches
        # A completion without tokens (a masked one) counts among the sequences, and adds nothing to any loss.
        takes_part = self.source.takes_part(advantages) & sequences.completion_mask.any(dim=1)
        one_pass: list[PolicyBatch] = []
        for step in range(minibatches):
            of_step = torch.arange(step * rows, (step + 1) * rows, device=advantages.device)
            updated = of_step[takes_part[of_step]]
            whole = PolicyBatch(
                sequences=sequences,
                advantages=advantages,
                sampling_logprobs=sampling_logprobs,
                old_logprobs=None,
                ref_logprobs=None,
                num_sequences=float(rows * self.world_size),
                num_tokens=self._sum(sequences.completion_mask[of_step]),
                updated_sequences=self._sum(takes_part[of_step]),
                updated_tokens=self._sum(sequences.completion_mask[updated]),
                metrics=metrics,
            )
            # The policy moves after the first optimizer step; until then its log-probabilities are the old ones. With further
            # passes over the rollout they are needed again.
            on_policy = step == 0 and epochs == 1
            parts = [whole.rows(index) for index in updated.tensor_split(accumulate)]
            one_pass.extend(self.source.add_logprobs(parts, on_policy))
        return one_pass * epochs

    def _sum(self, values: Tensor) -> float:
        return float(self.sum_over_ranks(values.sum()))

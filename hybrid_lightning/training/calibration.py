"""Calibration: losses at the start policy, whose mean gradient scores the modules.

    training prompts -> calibration rollouts -> losses, one for each chunk of rows

The losses are those of training on rewards, or on examples. Where all rewards are equal, which gives no gradient, they are
supervised losses of reference answers. Axes: P prompts, N sequences, B sequences of one chunk, T completion tokens.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.errors import CalibrationError
from hybrid_lightning.losses import ExampleLoss, PolicyLoss
from hybrid_lightning.losses.functional import any_advantage
from hybrid_lightning.rollout.batching import join_rewards, join_rollouts, pad_left, pad_right, pad_token, split_by_tokens
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.sharding.ranks import on_all_ranks, world_size
from hybrid_lightning.types import Completion, Episode, LossInputs, Prompt, Rewards, Rollouts, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.training.module import PolicyModule

# Calibration prompts that are completed together: few enough that several devices have a batch each.
_MOST_TOGETHER = 16

LogprobFunction = Callable[[Sequences], tuple[Tensor, Tensor]]


def calibration_rollouts(policy: "PolicyModule", prompts: Sequence[Prompt], kept: ScoringProgress) -> tuple[Rollouts, Rewards]:
    """Complete and score prompts with the start policy, each as often as in a rollout of training.

    Prompts are completed in batches of the same size whoever completes them, so that what is drawn does not depend on it, not
    even by rounding. Where the model is split, all ranks call this, and a batch of each is completed at a time. What is made is
    kept at once, and what a stopped run has kept is not made again.
    """
    device, samples = policy.model_device, policy.rollout_schedule.samples_per_prompt
    ids = [policy.encode(prompt) for prompt in prompts]
    kept.require({"calibration prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]})
    size = calibration_batch(policy.rollout_schedule.prompts_per_rollout)
    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]

    def complete(batch: range) -> dict[str, Any]:
        some = [prompts[place] for place in batch]
        if policy.weights.sharded:
            policy.generation.update()  # of a rollout engine, by all ranks together
        return _completions_to_state(policy.generate(some, samples, PromptDraws(some, samples, policy.calibration_seed, batch)))

    parts: dict[range, Rollouts] = {}

    def score(batch: range) -> dict[str, Any]:
        return vars(policy.score(parts[batch]).to("cpu"))

    rewards: list[Rewards] = []
    at_once = world_size() if policy.weights.sharded else 1
    for start in range(0, len(batches), at_once):
        some = batches[start : start + at_once]
        for batch, state in _recalled(policy, kept, "completions", some, complete).items():
            parts[batch] = _completions_from_state(state, [prompts[place] for place in batch], samples, device)
        scored = _recalled(policy, kept, "rewards", some, score)
        rewards += [Rewards(**scored[batch]).to(device) for batch in some]
    return join_rollouts([parts[batch] for batch in batches]), join_rewards(rewards)


def calibration_batch(prompts_per_rollout: int) -> int:
    """Calibration prompts that are completed together, of which several devices take a batch each."""
    return min(_MOST_TOGETHER, prompts_per_rollout)


def _recalled(
    policy: "PolicyModule", kept: ScoringProgress, what: str, batches: Sequence[range], make: Callable[[range], dict[str, Any]]
) -> dict[range, dict[str, Any]]:
    """What is made of each of some batches, of which there are no more than ranks that share the work."""
    names = {f"{what}-{batch.start}-{batch.stop - 1}": batch for batch in batches}

    def make_all(missing: Sequence[str]) -> list[dict[str, Any]]:
        if not policy.weights.sharded:
            return [make(names[name]) for name in missing]
        # A rank without a batch repeats the first, since all gather weights together.
        mine = missing[rank] if (rank := torch.distributed.get_rank()) < len(missing) else missing[0]
        return on_all_ranks(lambda: make(names[mine]), policy.signals, "score the modules")[: len(missing)]

    return {names[name]: state for name, state in kept.recall(list(names), make_all).items()}


def equal_slices(length: int, number: int) -> list[slice]:
    """Neighbouring slices of a sequence, as equal as they can be."""
    return [slice(length * i // number, length * (i + 1) // number) for i in range(number)]


class CalibrationLosses(ABC):
    """Scalar losses, one for each chunk of rows; their mean is the loss of all rows. Iterating computes them anew.

    Attributes:
        chunks: What each loss is computed from.
        info: Plain values about the losses, which the plan keeps.
    """

    chunks: Sequence[Any]
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Tensor]:
        return self.since(0)

    @abstractmethod
    def since(self, seen: int) -> Iterator[Tensor]:
        """The losses after the first `seen` ones."""

    def state_dict(self) -> dict[str, Any]:
        """What later losses need of those computed so far; nothing unless a subclass says so."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run that was stopped."""
        assert not state, "this class keeps no state"


class StepCalibration(CalibrationLosses):
    """The losses of several optimizer steps, one after another; those of a step add up to the loss of its rows."""

    def __init__(self, steps: Sequence[CalibrationLosses]) -> None:
        self.steps = steps
        self.chunks = [chunk for step in steps for chunk in step.chunks]
        self.step_ends = tuple(accumulate(len(step) for step in steps))
        infos = [step.info for step in steps]
        counts = {name: sum(info[name] for info in infos) for name in ("sequences", "useful_sequences")}
        self.info: dict[str, Any] = {**infos[0], **counts, "steps": len(steps)}

    def since(self, seen: int) -> Iterator[Tensor]:
        """See `CalibrationLosses`."""
        for step, end in zip(self.steps, self.step_ends, strict=True):
            for loss in step.since(min(len(step), max(0, seen - (end - len(step))))):
                yield loss / len(step)

    def state_dict(self) -> dict[str, Any]:
        """What the steps need."""
        return {"steps": [step.state_dict() for step in self.steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run that was stopped."""
        for step, saved in zip(self.steps, state["steps"], strict=True):
            if len(step):
                step.load_state_dict(saved)


class TrainingCalibration(CalibrationLosses):
    """Training losses at the start policy and, in later iterations, by how much changed weights improve the objective.

    Log-probabilities of the first iteration, which is at the start policy, are kept as the old ones and as the reference.

    Args:
        signal: What is learned from, for the plan.
        sequences: N rows.
        chunks: Those of the rows that add to the loss, in chunks, and their advantages.
        loss: The training loss.
        logprobs: Log-probabilities with gradient and entropies of B sequences, [B, T] each.
        counted: See `Rewards`, [N] bool or None.
        max_completion_tokens: Longest completion that can be sampled, which some losses need.
    """

    def __init__(
        self,
        signal: str,
        sequences: Sequences,
        chunks: Sequence[tuple[Sequences, Tensor]],
        loss: PolicyLoss | ExampleLoss,
        logprobs: LogprobFunction,
        counted: Tensor | None = None,
        max_completion_tokens: float | None = None,
    ) -> None:
        self.chunks, self.loss, self.logprobs, self.max_completion_tokens = chunks, loss, logprobs, max_completion_tokens
        self.start_logprobs: dict[int, Tensor] = {}  # of each chunk that has been computed
        # Denominators for which the mean of the chunks' losses is the mean over all sequences that count, or all their tokens.
        self.num_sequences = (len(sequences) if counted is None else int(counted.sum())) / max(1, len(chunks))
        self.num_tokens = float(sequences.sampled_mask.sum()) / max(1, len(chunks))
        useful = sum(len(rows) for rows, _ in chunks)
        self.info: dict[str, Any] = {"signal": signal, "sequences": len(sequences), "useful_sequences": useful}

    def state_dict(self) -> dict[str, Any]:
        """Log-probabilities of the start policy, of the chunks computed so far."""
        return {"start_logprobs": self.start_logprobs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run that was stopped."""
        device = self.chunks[0][1].device
        self.start_logprobs = {number: tensor.to(device) for number, tensor in state["start_logprobs"].items()}

    def since(self, seen: int) -> Iterator[Tensor]:
        """See `CalibrationLosses`."""
        for number, (sequences, advantages) in enumerate(self.chunks[seen:], start=seen):
            logprobs, entropy = self.logprobs(sequences)
            start = self.start_logprobs.setdefault(number, logprobs.detach())
            inputs = LossInputs(
                logprobs=logprobs,
                advantages=advantages,
                sampled_mask=sequences.sampled_mask,
                old_logprobs=start,
                ref_logprobs=start,  # the start policy is the policy that sampled
                num_sequences=self.num_sequences,
                num_tokens=self.num_tokens,
                entropy=entropy,
                max_completion_tokens=self.max_completion_tokens,
                micro_batch_tokens=self.num_tokens,  # all of the calibration rows are one micro-batch
            )
            yield self.loss(inputs).loss


class RewardCalibration(TrainingCalibration):
    """Training losses of calibration rollouts, those that are left out of the loss without tokens.

    Rows without advantage, [N] or [N, T], are left out, unless the loss has an entropy bonus: their gradient is exactly zero.
    A chunk has at most `max_tokens`, as in training, so that scoring needs no more memory.
    """

    def __init__(
        self,
        sequences: Sequences,
        advantages: Tensor,
        loss: PolicyLoss,
        logprobs: LogprobFunction,
        max_tokens: int,
        max_completion_tokens: int,
        counted: Tensor | None = None,
    ) -> None:
        adds = any_advantage(advantages) | loss.needs_entropy
        useful = (adds & sequences.sampled_mask.any(dim=1)).nonzero().squeeze(1)
        kept, weights = sequences.rows(useful), advantages[useful]
        runs = [(kept.rows(run), weights[run]) for run in split_by_tokens(kept, max_tokens)]
        chunks = [(rows, of[:, : rows.completion_ids.shape[1]] if of.dim() == 2 else of) for rows, of in runs]
        super().__init__("reward", sequences, chunks, loss, logprobs, counted, float(max_completion_tokens))


class AnswerCalibration(CalibrationLosses):
    """Supervised losses of reference answers, for calibration rollouts whose rewards are all equal.

    The tokenizer encodes the answers, and ends each with its end-of-sequence token.

    Raises:
        CalibrationError: If a prompt has no answer.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        logprobs: LogprobFunction,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        if any(prompt.answer is None for prompt in prompts):
            raise CalibrationError(
                f"all rewards of the {len(prompts)} calibration prompts are equal, so modules cannot be scored, and the data has "
                "no answers to score by instead; raise adapter.calibration_prompts, make the task easier, or give adapter.plan"
            )
        end, pad = int(tokenizer.eos_token_id), pad_token(tokenizer)
        answers = [[*tokenizer(str(prompt.answer), add_special_tokens=False)["input_ids"], end] for prompt in prompts]
        self.sequences = Sequences(*pad_left(prompt_ids, pad, device), *pad_right(answers, pad, device))
        self.chunks = [self.sequences.rows(run) for run in split_by_tokens(self.sequences, max_tokens)]
        self.logprobs = logprobs
        self.info: dict[str, Any] = {"signal": "answers", "sequences": len(prompts), "useful_sequences": len(prompts)}

    def since(self, seen: int) -> Iterator[Tensor]:
        """See `CalibrationLosses`."""
        share = len(self.chunks) / len(self.sequences)
        for sequences in self.chunks[seen:]:
            mask = sequences.sampled_mask
            token_mean = (self.logprobs(sequences)[0] * mask).sum(dim=1) / mask.sum(dim=1)
            yield -token_mean.sum() * share


def _completions_to_state(rollouts: Rollouts) -> dict[str, Any]:
    """Rollouts as plain data and tensors on the CPU."""
    texts = [(str(text), {**vars(text), "episode": text.episode and vars(text.episode)}) for text in rollouts.completions]
    tensors = {"sampling_logprobs": rollouts.sampling_logprobs.cpu(), "finished": rollouts.finished.cpu()}
    return {"sequences": vars(rollouts.sequences.to("cpu")), "completions": texts, **tensors}


def _completions_from_state(state: dict[str, Any], prompts: Sequence[Prompt], samples: int, device: torch.device) -> Rollouts:
    """Undo `_completions_to_state`."""
    texts = [
        (text, {**named, "episode": named["episode"] and Episode(**named["episode"])}) for text, named in state["completions"]
    ]
    return Rollouts(
        prompts=tuple(prompts),
        sequences=Sequences(**state["sequences"]).to(device),
        completions=tuple(Completion(text, **own) for text, own in texts),
        sampling_logprobs=state["sampling_logprobs"].to(device),
        finished=state["finished"].to(device),
        samples_per_prompt=samples,
    )

"""Calibration: losses of the start policy. Their mean gradient scores the modules.

    training prompts -> calibration rollouts -> losses, one per chunk of rows

The losses are the training losses, on rewards or on examples. Equal rewards give no gradient, so if all rewards are equal, the
losses are supervised losses of the reference answers.

Axes: P prompts, B rows of tokens, T completion tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hybrid_lightning.errors import CalibrationError, ConfigError
from hybrid_lightning.losses import ExampleLoss, PolicyLoss
from hybrid_lightning.losses.functional import any_advantage
from hybrid_lightning.rollout.batching import join_rollouts, pad_left, pad_right, pad_token, split_by_tokens
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.sharding.ranks import on_all_ranks, world_size
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.run_checks import all_are_cut
from hybrid_lightning.types import PolicyBatch, Prompt, Rollout, Sequences

# Calibration prompts that one device completes together.
_MOST_TOGETHER = 16

LogprobFunction = Callable[[Sequences], tuple[Tensor, Tensor]]


def calibration_rollout(generation: Generation, prompts: Sequence[Prompt], schedule: RolloutSchedule, seed: int) -> Rollout:
    """Complete and score prompts with the start policy, with the same number of completions per prompt as in training.

    If the model is split, all ranks must call this. Each rank completes a share of the prompts, and gets all completions.
    """
    policy, samples, split = generation.policy, schedule.samples_per_prompt, generation.policy.weights.sharded
    rank, ranks = (dist.get_rank(), world_size()) if split else (0, 1)

    def make(places: range) -> Rollout:
        some = [prompts[place] for place in places]
        return generation.score(generation.generate(some, samples, PromptDraws(some, samples, seed, places)))

    if split:
        generation.update()  # update of a rollout engine, by all ranks together
    parts: list[Rollout] = []
    size = ranks * calibration_batch(schedule.prompts_per_rollout)
    for start in range(0, len(prompts), size):
        places = range(start, min(start + size, len(prompts)))
        if not split:
            parts.append(make(places))
            continue
        shares = [places[len(places) * i // ranks : len(places) * (i + 1) // ranks] for i in range(ranks)]
        mine = shares[rank] or places[:1]  # a rank without a prompt repeats one, since all ranks gather weights together

        def on_host(mine: range = mine) -> Rollout:
            return make(mine).to("cpu")

        made = on_all_ranks(on_host, generation.run.signals, "score the modules")
        parts += [part for part, share in zip(made, shares, strict=True) if share]
    return join_rollouts(parts).to(policy.device)


def calibration_batch(prompts_per_rollout: int) -> int:
    """Calibration prompts that one device completes together."""
    return min(_MOST_TOGETHER, prompts_per_rollout)


@dataclass(frozen=True)
class CalibrationLosses:
    """Scalar losses of the start policy, one per chunk of rows; their mean is the loss of all rows.

    Each loss is computed on access, so that its backward pass can free its graph before the next loss is computed.
    """

    chunks: Sequence[Any]  # each loss is computed from one of these
    loss_of: Callable[[Any], Tensor]  # the loss of a chunk
    info: dict[str, Any]  # plain values about the losses, which the plan keeps

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor:
        return self.loss_of(self.chunks[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.loss_of, self.chunks)


def rollout_losses(
    batch: PolicyBatch,
    prompts: Sequence[Prompt],
    loss: PolicyLoss,
    generation: Generation,
    logprobs: LogprobFunction,
    max_tokens: int,
) -> CalibrationLosses:
    """Losses of calibration rollouts: from their rewards or, if all rewards are equal, from the reference answers.

    Rows without tokens are left out of the loss. Rows with advantages of 0 are left out, too, unless the loss has an entropy
    bonus: their gradient is exactly zero.

    Args:
        batch: The rows of all completions.
        prompts: Their P prompts.
        loss: The training loss.
        generation: Encodes the prompts.
        logprobs: Log-probabilities with gradient and entropies of B rows, [B, T] each.
        max_tokens: Most tokens of a chunk, as in training, so that scoring needs no more memory than training.

    Raises:
        ConfigError: If all completions are masked.
        CalibrationError: If all rewards are equal and the data has no answers.
    """
    learned = batch.sequences.sampled_mask.any(dim=1)
    if not learned.any():
        raise ConfigError(all_are_cut(len(learned), "the calibration", generation))
    if bool(batch.advantages[learned].any()):
        useful = (learned & (any_advantage(batch.advantages) | loss.needs_entropy)).nonzero().squeeze(1)
        longest = float(generation.max_completion_tokens)
        runs = split_by_tokens(batch.sequences.rows(useful), max_tokens)
        losses = training_losses("reward", batch, useful, runs, loss, logprobs, longest)
    else:
        losses = answer_losses(prompts, generation, logprobs, max_tokens)
    losses.info["prompts"] = len(prompts)
    return losses


def training_losses(
    signal: str,
    batch: PolicyBatch,
    useful: Tensor | slice,
    runs: Sequence[slice],
    loss: PolicyLoss | ExampleLoss,
    logprobs: LogprobFunction,
    max_completion_tokens: float | None = None,
) -> CalibrationLosses:
    """Training losses of the start policy, which here is also the policy that sampled and the reference.

    Args:
        signal: Source of the learning signal, for the plan.
        batch: All rows.
        useful: The rows that contribute to the loss.
        runs: The chunks that these are split into.
        loss: The training loss.
        logprobs: Log-probabilities with gradient and entropies of B rows, [B, T] each.
        max_completion_tokens: Length of the longest completion that can be sampled, which some losses need.
    """
    # With these denominators, the mean of the chunks' losses is the mean over all counted sequences, or over all their tokens.
    sequences = round(float(batch.row_weights.sum())) / max(1, len(runs))
    tokens = float(batch.sequences.sampled_mask.sum()) / max(1, len(runs))
    kept = replace(batch, num_sequences=sequences, num_tokens=tokens, rollout=None).rows(useful)

    def loss_of(chunk: PolicyBatch) -> Tensor:
        policy, entropy = logprobs(chunk.sequences)
        start = policy.detach()
        at_start = replace(chunk, sampling_logprobs=start, old_logprobs=start, ref_logprobs=start)
        inputs = at_start.loss_inputs(
            policy,
            entropy=entropy,
            max_completion_tokens=max_completion_tokens,
            micro_batch_tokens=tokens,  # all calibration rows form one micro-batch
        )
        return loss(inputs).loss

    info = {"signal": signal, "sequences": len(batch.sequences), "useful_sequences": len(kept.sequences)}
    return CalibrationLosses([kept.rows(run) for run in runs], loss_of, info)


def answer_losses(
    prompts: Sequence[Prompt], generation: Generation, logprobs: LogprobFunction, max_tokens: int
) -> CalibrationLosses:
    """Supervised losses of reference answers, for calibration rollouts in which all rewards are equal.

    Each answer is tokenized and ends with the end-of-sequence token.

    Raises:
        CalibrationError: If a prompt has no answer.
    """
    if any(prompt.answer is None for prompt in prompts):
        raise CalibrationError(
            f"all rewards of the {len(prompts)} calibration prompts are equal, and the data has no answers, so modules cannot be "
            "scored; raise adapter.calibration_prompts, make the task easier, or give adapter.plan"
        )
    tokenizer, device = generation.policy.pretrained.tokenizer, generation.policy.device
    end, pad = int(tokenizer.eos_token_id), pad_token(tokenizer)
    answers = [[*tokenizer(str(prompt.answer), add_special_tokens=False)["input_ids"], end] for prompt in prompts]
    sequences = Sequences(
        *pad_left([generation.encode(prompt) for prompt in prompts], pad, device), *pad_right(answers, pad, device)
    )
    chunks = [sequences.rows(run) for run in split_by_tokens(sequences, max_tokens)]

    def loss_of(rows: Sequences) -> Tensor:
        mask = rows.sampled_mask
        token_mean = (logprobs(rows)[0] * mask).sum(dim=1) / mask.sum(dim=1)
        return -token_mean.sum() * (len(chunks) / len(sequences))

    return CalibrationLosses(chunks, loss_of, {"signal": "answers", "sequences": len(prompts), "useful_sequences": len(prompts)})

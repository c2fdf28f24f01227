"""Pad rows, split them by their number of tokens, join them, distribute them over ranks, and save them.

Axes: B rows of tokens (one or more for each episode), S prompt tokens (left-padded), T completion tokens (right-padded).

The number of rows in a forward and backward pass depends on their length. The denominators of a loss count the whole optimizer
step. So the gradient does not depend on how the rows of a step are split, or redistributed to another number of ranks after a
resume.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.runner import begins_group
from hybrid_lightning.types import Completion, Episode, PolicyBatch, Prompt, Rewards, Rollout, Sequences


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up rows: the tokenizer's own, or the end-of-sequence token if it has none. No mask includes it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the left. Returns ids [B, S] int64 and the mask [B, S] bool, True on real tokens."""
    ids, mask = pad_right([row[::-1] for row in rows], pad_id, device)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the right. Returns ids [B, T] int64 and the mask [B, T] bool, True on real tokens."""
    ids = pad_values(rows, pad_id, torch.long, device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]


def pad_values(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Rows of unequal lengths as one tensor [B, longest], filled up on the right."""
    width = max(len(row) for row in rows)
    # All at once: a tensor for each row takes five times as long.
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)


def split_by_tokens(sequences: Sequences, max_tokens: int, together: int = 1) -> list[slice]:
    """Split rows into runs of neighbours with at most `max_tokens` tokens; only a single longer row may exceed that.

    The tokens of a prompt count once for neighbours that share it, as in the packed forward pass. If its completions are in
    several runs, the prompt counts in each of them.

    Each group of `together` rows stays together, counted from the first row; B must be a multiple of `together`.
    """
    prompts = sequences.prompt_mask.sum(dim=1).tolist()
    completions = sequences.completion_mask.sum(dim=1).tolist()
    begins: list[bool] = begins_group(sequences).tolist() if len(sequences) else []
    runs, start, used = [], 0, 0
    for row in range(0, len(prompts), together):
        unit = range(row, row + together)
        needed = sum(completions[i] + (prompts[i] if begins[i] else 0) for i in unit)
        alone = needed + (0 if begins[row] else prompts[row])  # tokens of the unit if it begins a run
        if row > start and used + needed > max_tokens:
            runs.append(slice(start, row))
            start, used = row, alone
        else:
            used += alone if row == start else needed
    return [*runs, slice(start, len(prompts))] if prompts else []


def minibatch(
    batch: PolicyBatch, number: int, needs_all_rows: bool, samples_per_prompt: int, total: Callable[[Tensor], Tensor]
) -> PolicyBatch:
    """The rows of an optimizer step that contribute to it, with the step's denominators.

    Args:
        batch: This rank's rows of the step.
        number: Number of its rollout.
        needs_all_rows: Whether rows without advantage contribute, too.
        samples_per_prompt: G.
        total: The sum over all ranks.
    """

    def count(values: Tensor) -> float:
        return float(total(values.sum()))

    has_tokens, episodes = batch.sequences.sampled_mask.any(dim=1), batch.episode_of_row
    # A row without tokens adds nothing to a loss, and an episode without advantage nothing to most.
    learned = batch.advantages.view(len(episodes), -1).any(dim=1) | needs_all_rows
    contributes = has_tokens & torch.isin(episodes, episodes[has_tokens & learned])
    if not count(contributes):  # some rows, with a gradient of 0, so that the step logs the usual metrics
        shown = episodes[has_tokens].unique_consecutive()[::samples_per_prompt]
        contributes = has_tokens & torch.isin(episodes, shown)
    updated = contributes.nonzero().flatten()
    tokens, weights = batch.sequences.sampled_mask, batch.row_weights
    return replace(
        batch.rows(updated),
        # Weights of an episode's rows add up to 1, or to 0 if it does not count. A masked one counts as a sequence.
        num_sequences=float(round(count(weights))),
        num_tokens=count(tokens),
        updated_sequences=float(round(count(weights[updated]))),
        updated_tokens=count(tokens[updated]),
        rollout_number=number,
    )


def join_rows(parts: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Stack tensors of consecutive rows, [b, t] each, to [B, width], with zeros on the right of narrower parts.

    None for `width` takes the width of the widest part. Parts may also be [b] each, which become [B].
    """
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    columns = max(part.shape[1] for part in parts) if width is None else width
    return torch.cat([pad(part, (0, columns - part.shape[1])) for part in parts])


def join_sequences(parts: Sequence[Sequences]) -> Sequences:
    """Concatenate sequences; prompts stay left-padded and completions right-padded."""
    start = max(part.prompt_ids.shape[1] for part in parts)
    return Sequences(
        torch.cat([pad(part.prompt_ids, (start - part.prompt_ids.shape[1], 0)) for part in parts]),
        torch.cat([pad(part.prompt_mask, (start - part.prompt_mask.shape[1], 0)) for part in parts]),
        join_rows([part.completion_ids for part in parts]),
        join_rows([part.completion_mask for part in parts]),
        _join_known([part.weights_step for part in parts]),
        join_rows([part.sampled_mask for part in parts]),
    )


def _join_known(parts: Sequence[Tensor | None], width: int | None = None) -> Tensor | None:
    """`join_rows`, or None if a part is unknown."""
    known = [part for part in parts if part is not None]
    return join_rows(known, width) if len(known) == len(parts) else None


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts with the same number of samples per prompt, and with the same fields."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else join_rows(values)

    return replace(
        first,
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        completions=tuple(completion for part in parts for completion in part.completions),
        sequences=join_sequences([part.sequences for part in parts]),
        sampling_logprobs=joined("sampling_logprobs"),
        episode_of_row=_numbered([part.episode_of_row for part in parts], [len(part.completions) for part in parts]),
        rewards=None if first.rewards is None else join_rewards([part.rewards for part in parts if part.rewards is not None]),
        advantages=None if first.advantages is None else torch.cat([cast(Tensor, part.advantages) for part in parts]),
        token_advantages=joined("token_advantages"),
        useful=joined("useful"),
    )


def join_rewards(parts: Sequence[Rewards]) -> Rewards:
    """Concatenate rewards of groups."""
    counted = [torch.ones_like(part.correct) if part.counted is None else part.counted for part in parts]
    return replace(
        parts[0],
        total=torch.cat([part.total for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        counted=None if all(part.counted is None for part in parts) else torch.cat(counted),
    )


def select_groups(rollout: Rollout, groups: range) -> Rollout:
    """The part of a rollout with some neighbouring prompts."""
    size = rollout.group_size
    episodes = slice(groups.start * size, groups.stop * size)
    first, end = (rollout.first_row(number) for number in (episodes.start, episodes.stop))
    sequences, some = rollout.sequences.rows(slice(first, end)), slice(groups.start, groups.stop)

    def cut(values: Tensor | None) -> Any:
        return None if values is None else values[first:end, : sequences.completion_ids.shape[1]]

    return replace(
        rollout,
        prompts=rollout.prompts[some],
        completions=rollout.completions[episodes],
        sequences=sequences,
        sampling_logprobs=cut(rollout.sampling_logprobs),
        episode_of_row=rollout.episode_of_row[first:end] - episodes.start,
        rewards=None if rollout.rewards is None else rollout.rewards.select(some),
        advantages=None if rollout.advantages is None else rollout.advantages[some],
        token_advantages=cut(rollout.token_advantages),
        useful=None if rollout.useful is None else rollout.useful[some],
    )


def batches_of_rank(batches: Sequence[Sequence[PolicyBatch]], rank: int, ranks: int) -> list[PolicyBatch]:
    """Redistribute the episodes of saved micro-batches to the current number of ranks; returns this rank's micro-batches."""
    if len(batches) == ranks:
        return list(batches[rank])
    # Neighbours stay together, since they may share a prompt.
    return [join_batches(parts).split(ranks)[rank] for parts in zip(*batches, strict=True)]


def join_batches(parts: Sequence[PolicyBatch]) -> PolicyBatch:
    """Concatenate batches of the same optimizer step, with different episodes."""
    parts = [part for part in parts if len(part.sequences)] or parts[:1]
    width = max(part.sequences.completion_ids.shape[1] for part in parts)
    seen = [part.seen_by_teacher for part in parts if part.seen_by_teacher is not None]
    episodes = [part.episode_of_row for part in parts]
    return replace(
        parts[0],
        sequences=join_sequences([part.sequences for part in parts]),
        advantages=join_rows([part.advantages for part in parts], width),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts], width),
        old_logprobs=_join_known([part.old_logprobs for part in parts], width),
        ref_logprobs=_join_known([part.ref_logprobs for part in parts], width),
        policy_mask=_join_known([part.policy_mask for part in parts], width),
        seen_by_teacher=join_sequences(seen) if len(seen) == len(parts) else None,
        episode_of_row=_numbered(episodes, [int(numbers.max()) + 1 if len(numbers) else 0 for numbers in episodes]),
        row_weights=torch.cat([part.row_weights for part in parts]),
    )


def _numbered(episodes: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The episodes of the rows of several parts, numbered across the parts, which have these counts of numbers."""
    return torch.cat([numbers + sum(counts[:part]) for part, numbers in enumerate(episodes)])


def rollout_of_rank(parts: Sequence[Rollout], rank: int, ranks: int) -> Rollout:
    """Redistribute a saved rollout to the current number of ranks; returns the part that this rank shows."""
    if len(parts) == ranks:
        return parts[rank]
    whole = join_rollouts(parts)
    count = len(whole.prompts)
    return select_groups(whole, range(rank * count // ranks, (rank + 1) * count // ranks))


# ---- for a checkpoint, as plain data and tensors on the CPU


def batch_to_state(batch: PolicyBatch) -> dict[str, Any]:
    """A micro-batch without its rollout, which other micro-batches share."""
    state = {**vars(batch.to("cpu")), "rollout": None}
    return {name: dict(vars(value)) if isinstance(value, Sequences) else value for name, value in state.items()}


def batch_from_state(state: dict[str, Any]) -> PolicyBatch:
    """Restore a micro-batch from the state that `batch_to_state` returned."""
    rows = {name: Sequences(**state[name]) for name in ("sequences", "seen_by_teacher") if state.get(name) is not None}
    return PolicyBatch(**{**state, **rows})


def rollout_to_state(rollout: Rollout, places: Mapping[int, int]) -> dict[str, Any]:
    """A rollout as a state; `places` maps the `id` of its prompts to their places among the training prompts."""
    texts = [[text, {**vars(text), "episode": text.episode and vars(text.episode)}] for text in rollout.completions]
    return {
        **vars(rollout.to("cpu")),
        "prompts": [places[id(prompt)] for prompt in rollout.prompts],
        "completions": json.dumps(texts, default=dict),  # messages may be other mappings than dicts
        "sequences": dict(vars(rollout.sequences.to("cpu"))),
        "rewards": dict(vars(rollout.scored.to("cpu"))),
    }


def rollout_from_state(state: dict[str, Any], prompts: Sequence[Prompt], device: torch.device) -> Rollout:
    """Restore a rollout of some of these training prompts from the state that `rollout_to_state` returned."""
    completions = [
        Completion(text, **{**named, "episode": named["episode"] and _episode(named["episode"])})
        for text, named in json.loads(state["completions"])
    ]
    restored = {
        "prompts": tuple(prompts[place] for place in state["prompts"]),
        "completions": tuple(completions),
        "sequences": Sequences(**state["sequences"]),
        "rewards": Rewards(**state["rewards"]),
    }
    return Rollout(**{**state, **restored}).to(device)


def _episode(named: dict[str, Any]) -> Episode:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return Episode(**fields)

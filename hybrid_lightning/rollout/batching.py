"""Pad rows, split them by their number of tokens, join them, distribute them over ranks, and save them.

Axes: B rows (sequences), S prompt tokens (left-padded), T completion tokens (right-padded).

The number of rows in a forward and backward pass depends on their length. The denominators of a loss count the whole optimizer
step. So the gradient does not depend on how the rows of a step are split, or redistributed to another number of ranks after a
resume.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.engine import begins_group
from hybrid_lightning.types import Completion, Episode, PolicyBatch, Prompt, Rewards, Rollouts, ScoredRollout, Sequences


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up rows: the tokenizer's own, or the end-of-sequence token if it has none. No mask includes it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the left. Returns ids [B, S] int64 and the mask [B, S] bool, True on real tokens."""
    ids, mask = pad_right([row[::-1] for row in rows], pad_id, device)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the right. Returns ids [B, T] int64 and the mask [B, T] bool, True on real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]


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


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollouts with the same number of samples per prompt."""
    if len(parts) == 1:
        return parts[0]
    return Rollouts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        sequences=join_sequences([part.sequences for part in parts]),
        completions=tuple(completion for part in parts for completion in part.completions),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        samples_per_prompt=parts[0].samples_per_prompt,
    )


def join_rewards(parts: Sequence[Rewards]) -> Rewards:
    """Concatenate rewards."""
    counted = [torch.ones_like(part.correct) if part.counted is None else part.counted for part in parts]
    return replace(
        parts[0],
        total=torch.cat([part.total for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        counted=None if all(part.counted is None for part in parts) else torch.cat(counted),
    )


def batches_of_rank(batches: Sequence[Sequence[PolicyBatch]], rank: int, ranks: int) -> list[PolicyBatch]:
    """Redistribute saved micro-batches to the current number of ranks; returns this rank's, the same number for each rank."""
    if len(batches) == ranks:
        return list(batches[rank])
    joined = [_join_batches(parts) for parts in zip(*batches, strict=True)]
    # tensor_split keeps neighbours together, which may share a prompt.
    rows = [torch.arange(len(batch.sequences), device=batch.advantages.device).tensor_split(ranks)[rank] for batch in joined]
    return [batch.rows(of_rank) for batch, of_rank in zip(joined, rows, strict=True)]


def _join_batches(parts: Sequence[PolicyBatch]) -> PolicyBatch:
    parts = [part for part in parts if len(part.sequences)] or parts[:1]
    width = max(part.sequences.completion_ids.shape[1] for part in parts)
    seen = [part.seen_by_teacher for part in parts if part.seen_by_teacher is not None]
    return replace(
        parts[0],
        sequences=join_sequences([part.sequences for part in parts]),
        advantages=join_rows([part.advantages for part in parts], width),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts], width),
        old_logprobs=_join_known([part.old_logprobs for part in parts], width),
        ref_logprobs=_join_known([part.ref_logprobs for part in parts], width),
        policy_mask=_join_known([part.policy_mask for part in parts], width),
        seen_by_teacher=join_sequences(seen) if len(seen) == len(parts) else None,
    )


def rollout_of_rank(parts: Sequence[ScoredRollout], rank: int, ranks: int) -> ScoredRollout:
    """Redistribute a saved rollout to the current number of ranks; returns the part that this rank shows."""
    if len(parts) == ranks:
        return parts[rank]
    of_ranks, of_rewards, advantages = zip(*parts, strict=True)
    rollouts, samples = join_rollouts(of_ranks), of_ranks[0].samples_per_prompt
    groups = range(len(rollouts.prompts))[rank * len(rollouts.prompts) // ranks : (rank + 1) * len(rollouts.prompts) // ranks]
    rows = torch.arange(groups.start * samples, groups.stop * samples, device=rollouts.finished.device)
    sequences = rollouts.sequences.rows(rows)
    own = Rollouts(
        prompts=rollouts.prompts[groups.start : groups.stop],
        sequences=sequences,
        completions=tuple(rollouts.completions[row] for row in rows.tolist()),
        sampling_logprobs=rollouts.sampling_logprobs[rows][:, : sequences.completion_ids.shape[1]],
        finished=rollouts.finished[rows],
        samples_per_prompt=samples,
    )
    return ScoredRollout(own, join_rewards(of_rewards).select(rows), torch.cat(advantages)[rows])


# ---- for a checkpoint, as plain data and tensors on the CPU


def batch_to_state(batch: PolicyBatch) -> dict[str, Any]:
    """A micro-batch without its rollout, which other micro-batches share."""
    state = {**vars(batch.to("cpu")), "rollout": None}
    return {name: dict(vars(value)) if isinstance(value, Sequences) else value for name, value in state.items()}


def batch_from_state(state: dict[str, Any]) -> PolicyBatch:
    """Restore a micro-batch from the state that `batch_to_state` returned."""
    rows = {name: Sequences(**state[name]) for name in ("sequences", "seen_by_teacher") if state.get(name) is not None}
    return PolicyBatch(**{**state, **rows})


def rollout_to_state(scored: ScoredRollout, places: Mapping[int, int]) -> dict[str, Any]:
    """A rollout as a state; `places` maps the `id` of its prompts to their places among the training prompts."""
    rollouts, rewards, advantages = scored
    texts = [[text, {**vars(text), "episode": text.episode and vars(text.episode)}] for text in rollouts.completions]
    return {
        "prompts": [places[id(prompt)] for prompt in rollouts.prompts],
        "samples_per_prompt": rollouts.samples_per_prompt,
        "completions": json.dumps(texts, default=dict),  # messages may be other mappings than dicts
        "sequences": dict(vars(rollouts.sequences.to("cpu"))),
        "sampling_logprobs": rollouts.sampling_logprobs.cpu(),
        "finished": rollouts.finished.cpu(),
        "rewards": dict(vars(rewards.to("cpu"))),
        "advantages": advantages.cpu(),
    }


def rollout_from_state(state: dict[str, Any], prompts: Sequence[Prompt], device: torch.device) -> ScoredRollout:
    """Restore a rollout of some of these training prompts from the state that `rollout_to_state` returned."""
    completions = [
        Completion(text, **{**named, "episode": named["episode"] and _episode(named["episode"])})
        for text, named in json.loads(state["completions"])
    ]
    rollouts = Rollouts(
        prompts=tuple(prompts[place] for place in state["prompts"]),
        sequences=Sequences(**state["sequences"]).to(device),
        completions=tuple(completions),
        sampling_logprobs=state["sampling_logprobs"].to(device),
        finished=state["finished"].to(device),
        samples_per_prompt=state["samples_per_prompt"],
    )
    return ScoredRollout(rollouts, Rewards(**state["rewards"]).to(device), state["advantages"].to(device))


def _episode(named: dict[str, Any]) -> Episode:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return Episode(**fields)

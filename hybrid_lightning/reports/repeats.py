"""Scores the completions of a rollout a second time, to find rewards that pay differently for the same completion.

A policy cannot tell chance from skill: it learns from a coin, or from the mood of a judge at temperature 1, as from any reward.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from hybrid_lightning.episodes.episodes import has_failed
from hybrid_lightning.errors import HybridLightningError, one_line
from hybrid_lightning.reports.findings import Finding
from hybrid_lightning.rewards import EpisodeReturn, RewardFunction
from hybrid_lightning.rewards.terms import term_values
from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state
from hybrid_lightning.training.generation import Generation, repeat_prompts
from hybrid_lightning.types import Prompt, Rollout

_SLOW = 64  # completions that a slow reward scores again
_ROUNDING, _OF_SPREAD = 1e-5, 1e-3  # what does not count: this share of the largest value, and of the spread of the values
_CHANCE = 0.5  # share of the variance within groups from which on chance decides what is learned


def scored_again(generation: Generation, rollout: Rollout) -> tuple[str, list[Finding]]:
    """Score completions again and compare with their rewards; random states stay unchanged.

    Nothing that rewards keep from earlier calls is used, such as a judge's replies. Of rewards that score completions one by one,
    which are slow, 64 completions are scored. An environment's own rewards would need other episodes, and are left out.

    Returns:
        A line about what was scored again, and a finding for each term that pays differently.
    """
    terms = [term for term in generation.reward_terms() if not isinstance(term, EpisodeReturn)]
    if not terms:
        return "not applicable: rewards of an environment or an agent would need other episodes", []
    rows = [row for row, completion in enumerate(rollout.completions) if not has_failed(completion)]
    if not rows:
        return "no completion counts", []
    prompts, state = repeat_prompts(rollout.prompts, rollout.group_size), capture_random_state()
    whole = tuple(rollout.completions[row] for row in rows), tuple(prompts[row] for row in rows)
    notes, found = [], []
    try:
        with ExitStack() as stack:
            for term in terms:
                stack.enter_context(term.anew())
            for term in terms:
                note, findings = _compared(term, whole, rows, rollout)
                notes.append(f"{term.name} {note}" if len(terms) > 1 else note)
                found += findings
    finally:
        restore_random_state(state)
    return "; ".join(notes), found


def _compared(
    term: RewardFunction, whole: tuple[Sequence[str], Sequence[Prompt]], rows: list[int], rollout: Rollout
) -> tuple[str, list[Finding]]:
    """Compare a term's values of these rows with the values that it gives now."""
    if all(term.overlaps(prompt) for prompt in whole[1]):
        whole, rows = (whole[0][:_SLOW], whole[1][:_SLOW]), rows[:_SLOW]
    rewards, samples = rollout.scored, rollout.group_size
    try:
        again = term_values(term, *whole)
    except HybridLightningError as error:
        return f"could not be scored again: {one_line(error)}", []
    there = torch.tensor([rewards.counts(*divmod(row, samples)) for row in rows]) & ~again.isnan()
    before, after = rewards.parts[term.name].cpu().flatten()[rows][there], again[there]
    groups = torch.tensor(rows)[there] // samples
    if not len(before):
        return "could not be scored again", []
    apart, both = (after - before).abs(), torch.cat([before, after])
    differ = apart > max(_ROUNDING * float(both.abs().max()), _OF_SPREAD * float(both.max() - both.min()))
    if not differ.any():
        return f"the same for {len(before)} completions that are scored twice", []
    count, mean, most = int(differ.sum()), float(apart.mean()), float(apart.max())
    note = f"different for {count} of {len(before)} completions that are scored twice, by {mean:.2g} on average, up to {most:.2g}"
    chance = float((after - before).square().mean()) / 2 / max(_variance_within(before, after, groups), 1e-30)
    text = f"the reward {term.name} is {note}"
    remedy = "remove the randomness (a judge's with options={temperature: 0}), or average several scores of a completion"
    return note, [Finding("repeat", text, remedy, "warning" if chance >= _CHANCE else "note")]


def _variance_within(before: Tensor, after: Tensor, groups: Tensor) -> float:
    """Variance of a term's values within the groups of completions of one prompt, from which a policy learns."""
    squares = []
    for group in groups.unique():
        for side in (before[groups == group], after[groups == group]):
            squares.append((side - side.mean()).square())
    return float(torch.cat(squares).mean())

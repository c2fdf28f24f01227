"""Evaluation: how well a policy solves held-out prompts, and how well it predicts held-out examples.

`Evaluation` is for prompts, `ExampleEvaluation` for examples. Validation and test call `add` for each batch, and `end` after the
last batch. Predict calls `predict`.

Axes: P prompts, n sampled completions of each in prompt-major order; E examples.
"""

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from hybrid_lightning.episodes.episodes import episode_records
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.losses import ExampleLoss
from hybrid_lightning.metrics import Problem, ProblemMeans, completion_draws, completion_values
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rollout.rng import evaluation_draws
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.types import LossInputs, Prompt, Rollout, Sequences

ACCURACY = re.compile(r"greedy_accuracy|(?:avg|pass|maj)@\d+")  # metrics that count right completions
Answers = Sequence[str | None]
Scored = tuple[Rollout, Answers]


def evaluation_means(samples: int, correctness: bool = True) -> ProblemMeans:
    """The metrics of one evaluation, from one greedy and n sampled completions of each prompt.

    The metrics are `problems`, `greedy_accuracy`, `greedy_reward`, `avg@n`, `pass@k`, `maj@k`, `reward`, `completion_length`,
    `truncation_rate`, and the bounds of confidence intervals; without `correctness` none that counts right completions.
    """
    draws = {"greedy_accuracy": 1, "greedy_reward": None, **completion_draws(samples)}
    return ProblemMeans({name: of for name, of in draws.items() if correctness or not ACCURACY.fullmatch(name)})


def add_prompts(means: ProblemMeans, greedy: Rollout, sampled: Rollout, answers: Answers) -> None:
    """Add the prompts of one batch to the metrics of an evaluation.

    Args:
        means: From `evaluation_means`.
        greedy: P scored greedy completions, one for each prompt.
        sampled: P * n scored completions of the same prompts.
        answers: The answer in each of the P * n completions; None if it has no answer.
    """
    if sampled.episode_of_row.device.type == "mps":  # mps has no float64
        greedy, sampled = greedy.to("cpu"), sampled.to("cpu")
    rewards, size = sampled.scored, sampled.group_size
    values = completion_values(
        rewards.correct,
        [answers[start : start + size] for start in range(0, len(answers), size)],
        rewards.total,
        sampled.lengths,
        sampled.finished,
        rewards.counted,
    )
    (correct, total), counted = (part.squeeze(1) for part in (greedy.scored.correct, greedy.scored.total)), greedy.scored.counted
    of_greedy = {"greedy_accuracy": correct, "greedy_reward": total}
    if counted is not None:
        of_greedy = {name: value.double().masked_fill(~counted.squeeze(1), torch.nan) for name, value in of_greedy.items()}
    values |= of_greedy
    index = torch.tensor([prompt.index for prompt in sampled.prompts], device=total.device)
    means.update([prompt.set_name for prompt in sampled.prompts], index, values)


def check_numbers(prompts: Sequence[Prompt]) -> None:
    """Raise DataError if two different prompts share an index, since prompts with one index count as one."""
    asked: dict[Problem, Any] = {}
    for prompt in prompts:
        if asked.setdefault((prompt.set_name, prompt.index), (prompt.text, prompt.messages)) != (prompt.text, prompt.messages):
            raise DataError(
                f"two prompts to evaluate have index={prompt.index} and would count as one; give each its own index, as in "
                "Prompt(text=..., index=n)"
            )


_UNSCORED = {"completion_length": None, "truncation_rate": None}  # metrics that need no reward


def add_lengths(means: ProblemMeans, rollout: Rollout) -> None:
    """Add prompts with n unscored completions each to the metrics of an evaluation."""
    rollout = rollout.to("cpu") if rollout.episode_of_row.device.type == "mps" else rollout  # mps has no float64
    index = torch.tensor([prompt.index for prompt in rollout.prompts], device=rollout.episode_of_row.device)
    values = [value.double().mean(dim=1) for value in (rollout.lengths, ~rollout.finished)]
    means.update([prompt.set_name for prompt in rollout.prompts], index, dict(zip(_UNSCORED, values, strict=True)))


class Evaluation(nn.Module):
    """Completes and scores held-out prompts, greedily and by sampling, and logs the results.

    It is a submodule of a LightningModule, so that its metrics move to the device; the module's hooks call `add` and `end`.

    Args:
        generation: Completes and scores prompts.
        samples: Sampled completions of each prompt (n).
        seed: Seed of the sampling.

    Attributes:
        by_problem: (set, index) -> metric -> value, for each problem in the last evaluation, over all ranks.
        greedy: This rank's first batch of greedy completions in the last evaluation, scored; None without completions.
        answers: For each of this rank's greedy completions in the last evaluation: the answer that the reward finds, whether it
            is right, and the reference answer; empty for episodes, and where no part of the reward measures correctness.
        last: Set -> metric -> value of the last evaluation, with "" for all sets together.

    Raises:
        ConfigError: If there are no samples.
    """

    def __init__(self, generation: Generation, samples: int, seed: int) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"model.eval_samples must be at least 1, got {samples}")
        self.generation, self.samples, self.seed = generation, samples, seed
        self.by_problem: dict[Problem, dict[str, float]] = {}
        self.greedy: Rollout | None = None
        self.last: dict[str, dict[str, float]] = {}
        self.answers: list[tuple[str | None, bool, str | None]] = []
        self._first: Rollout | None = None
        self._answers: list[tuple[str | None, bool, str | None]] = []
        means = partial(evaluation_means, samples, generation.measures_correctness)
        means = partial(ProblemMeans, _UNSCORED) if generation.reward is None else means
        self._prompts = nn.ModuleDict({stage: means() for stage in ("val", "test")})

    def names(self, sets: Collection[str]) -> list[str]:
        """Names of everything that a validation on prompts of these sets logs."""
        of_sets = self._means("val").names(sets)
        return [_name("val", name, value) for name, values in of_sets.items() for value in values]

    def add(self, stage: str, batch: Sequence[Prompt]) -> None:
        """Measure the policy on a batch of a stage, `val` or `test`; without a reward, only lengths."""
        check_numbers(batch)
        if self.generation.reward is None:
            draws = evaluation_draws(batch, self.samples, self.seed)
            add_lengths(self._means(stage), self.generation.generate(batch, self.samples, draws))
            return
        greedy, sampled = self._scored(batch)
        self._first = self._first or greedy
        if self.generation.episodes is None and self.generation.measures_correctness:
            found, right = self.generation.answers(greedy), greedy.scored.correct.flatten().tolist()
            self._answers += zip(found, right, (prompt.answer for prompt in batch), strict=True)
        add_prompts(self._means(stage), greedy, sampled, self.generation.answers(sampled))

    def end(self, stage: str) -> None:
        """Log STAGE/METRIC over all sets and STAGE/SET/METRIC for each named set, and reset."""
        self.last = self._end(stage)

    def _end(self, stage: str) -> dict[str, dict[str, float]]:
        means = self._means(stage)
        found = {name: {key: float(value) for key, value in of_set.items()} for name, of_set in means.compute().items()}
        means.reset()
        self.by_problem, self.greedy, self._first = means.by_problem, self._first, None
        self.answers, self._answers = self._answers, []
        self._log({_name(stage, name, key): value for name, of_set in found.items() for key, value in of_set.items()})
        return found

    def predict(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The greedy and the sampled completions of prompts, as records for JSON: one per prompt, or one per episode."""
        greedy, sampled = self._scored(prompts)
        generation = self.generation
        if generation.episodes is not None:
            return [*episode_records(greedy, greedy=True), *episode_records(sampled)]
        of_greedy, of_sampled = ((rollout, generation.answers(rollout)) for rollout in (greedy, sampled))
        render = generation.policy.pretrained.encoder.render
        return prediction_records(of_greedy, of_sampled, [render(prompt) for prompt in prompts])

    def begin_predict(self, batches: int) -> None:
        """If ranks gather weights together, record how many more batches than this rank's `batches` some rank has."""
        sharded, device = self.generation.policy.weights.sharded, self.generation.policy.device
        self._missing_batches = max(gather_counts(batches, device)) - batches if sharded else 0

    def end_predict(self) -> None:
        """Gather weights as often as the rank with the most batches, so that no prompt needs to be repeated."""
        self.generation.gather_again(2 * self._missing_batches)  # greedily and by sampling

    def _scored(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The greedy completions of prompts and the sampled ones, with their rewards."""
        generation, draws = self.generation, evaluation_draws(prompts, self.samples, self.seed)
        of_greedy, of_sampled = generation.arriving(prompts, 1), generation.arriving(prompts, self.samples)
        try:
            greedy = generation.generate(prompts, 1, greedy=True, on_completion=of_greedy.on_completion)
            sampled = generation.generate(prompts, self.samples, draws, on_completion=of_sampled.on_completion)
            return [generation.score(greedy, of_greedy), generation.score(sampled, of_sampled)]
        except BaseException:
            of_greedy.cancel()
            of_sampled.cancel()
            raise

    def _log(self, values: dict[str, float]) -> None:
        self.generation.run.log_evaluation(values)

    def _means(self, stage: str) -> ProblemMeans:
        return cast(ProblemMeans, self._prompts[stage])


_WEIGHT = ""  # key of an example's weight in the means, beside the names of the loss's terms


class ExampleEvaluation(Evaluation):
    """Measures the loss on held-out examples and, if there is a reward, scores completions of their prompts.

    Args:
        generation: Completes and scores prompts.
        samples: Sampled completions of each prompt (n).
        seed: Seed of the sampling.
        loss: Loss on examples.
        passes: Computes log-probabilities of examples.
        sequences_of: Returns the tokens of examples.
    """

    def __init__(
        self,
        generation: Generation,
        samples: int,
        seed: int,
        loss: ExampleLoss,
        passes: Passes,
        sequences_of: Callable[[Sequence[Prompt]], Sequences],
    ) -> None:
        super().__init__(generation, samples, seed)
        self._loss, self._passes, self._sequences_of = loss, passes, sequences_of
        rows = torch.zeros(loss.rows_per_example, 1)
        reference = rows if loss.needs_reference else None
        inputs = LossInputs(rows, rows[:, 0], torch.ones_like(rows, dtype=torch.bool), ref_logprobs=reference, entropy=rows)
        self._terms = list(loss.terms(inputs))
        columns = dict.fromkeys([_WEIGHT, *self._terms])
        self._examples = nn.ModuleDict({stage: ProblemMeans(columns) for stage in ("val", "test")})

    def names(self, sets: Collection[str]) -> list[str]:
        """Names of everything that a validation on examples of these sets logs."""
        measured = [_name("val", name) for name in self._terms]
        return measured if self.generation.reward is None else measured + super().names(sets)

    def add(self, stage: str, batch: Sequence[Prompt]) -> None:
        """Measure the loss on a batch of a stage, `val` or `test`; with a reward, also score completions."""
        sequences, run = self._sequences_of(batch), self.generation.run
        needs_reference = self._loss.needs_reference
        ((logprobs, entropy, reference),) = self._passes.measure([sequences], True, needs_reference, run.interruptible)
        assert logprobs is not None
        ones = torch.ones(len(sequences), device=logprobs.device)
        inputs = LossInputs(logprobs, ones, sequences.sampled_mask, ref_logprobs=reference, entropy=entropy)
        values = {_WEIGHT: self._loss.weights(sequences.sampled_mask), **self._loss.terms(inputs)}
        device = "cpu" if logprobs.device.type == "mps" else logprobs.device  # mps has no float64
        index = torch.tensor([prompt.index for prompt in batch], device=device)
        sets = [prompt.set_name for prompt in batch]
        self._losses(stage).update(sets, index, {name: value.to(device) for name, value in values.items()})
        if self.generation.reward is not None:
            super().add(stage, batch)

    def _end(self, stage: str) -> dict[str, dict[str, float]]:
        found = {} if self.generation.reward is None else super()._end(stage)
        losses = self._losses(stage)
        examples = losses.by_problem.values() if losses.compute() else ()
        losses.reset()
        # Over the examples of all sets; their weights differ.
        sums = {name: sum(example[name] for example in examples) for name in (_WEIGHT, *self._terms)}
        measured = {name: sums[name] / sums[_WEIGHT] for name in self._terms if examples}
        self._log({_name(stage, name): value for name, value in measured.items()})
        return {**found, "": {**measured, **found.get("", {})}}  # the loss is measured over all sets together

    def _losses(self, stage: str) -> ProblemMeans:
        return cast(ProblemMeans, self._examples[stage])


def _name(*parts: str) -> str:
    return "/".join(filter(None, parts))


def prediction_records(greedy: Scored, sampled: Scored, texts: list[str]) -> list[dict[str, Any]]:
    """One JSON-ready record per prompt: the prompt, the greedy completion, lists over sampled completions, and the row.

    There are P greedy and P * n sampled completions; `texts` are the prompts as the model reads them.
    """
    rollout, records = sampled[0], []
    for number, (prompt, text) in enumerate(zip(rollout.prompts, texts, strict=True)):
        each = [_scored_record(sampled, number, sample) for sample in range(rollout.group_size)]
        records.append(
            {
                "set": prompt.set_name,
                "index": prompt.index,
                "prompt": text,
                "answer": prompt.answer,
                "greedy": _scored_record(greedy, number, 0),
                **{_LISTS.get(name, name): [one[name] for one in each] for name in each[0] if name != "reward_parts"},
                "reward_parts": {name: [one["reward_parts"][name] for one in each] for name in rollout.scored.parts},
                "columns": prompt.columns,
            }
        )
    return records


# Names of lists that differ from the names of their entries.
_LISTS = {"completion": "completions", "extracted_answer": "extracted_answers", "length": "lengths", "reward": "rewards"}


def _scored_record(scored: Scored, prompt: int, sample: int) -> dict[str, Any]:
    rollout, answers = scored
    rewards, number = rollout.scored, prompt * rollout.group_size + sample
    counts, completion = rewards.counts(prompt, sample), rollout.completions[number]
    return {
        "completion": completion,
        "extracted_answer": answers[number],
        "length": completion.num_tokens,
        "finished": completion.finished,
        "reward": float(rewards.total[prompt, sample]) if counts else None,
        "reward_parts": {name: float(part[prompt, sample]) if counts else None for name, part in rewards.parts.items()},
        "correct": rewards.right(prompt, sample),
    }

r"""Checks the reward of the reference answers, and the reference answers themselves.

A reward that pays nothing for the reference answer cannot pay for anything.

A reference completion is the row's answer in the form that its prompt requires: like the answers in its few-shot examples, or in
`\boxed{}`, `<answer>` or another form that its text names, else the answer by itself. The best of them counts. If none is paid,
all other forms are tried.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from hybrid_lightning.data import FormatBySet, PromptFormat
from hybrid_lightning.data.template import fill_template
from hybrid_lightning.errors import HybridLightningError, JudgeError, shorten
from hybrid_lightning.reports.findings import Finding
from hybrid_lightning.rewards import evaluate_reward
from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollout

_PROMPTS = 32  # number of prompts searched for their own answer
_CONSTANT = 0.3  # share of the most frequent reference answer
# Text in a prompt -> the answer in the form that the prompt requires.
_FORMS: dict[str, Callable[[str], str]] = {
    r"\boxed": lambda answer: rf"\boxed{{{answer}}}",
    "<answer>": lambda answer: f"<answer>{answer}</answer>",
    "<think>": lambda answer: f"<think>\n.\n</think>\n<answer>\n{answer}\n</answer>",
    "####": lambda answer: f"#### {answer}",
    "answer is": lambda answer: f"The answer is {answer}",
    "Answer:": lambda answer: f"Answer: {answer}",
    "```": lambda answer: f"```python\n{answer}\n```",
}


@dataclass(frozen=True)
class References:
    """The rewards of the reference answers of some rows."""

    note: str  # one line: what was tried, or why nothing could be tried
    findings: tuple[Finding, ...] = ()  # problems


def reference_answers(prompts: Sequence[Prompt], accuracy: float | None) -> References:
    """Examine the reference answers of training prompts: the most frequent one, and whether prompts contain their own.

    `accuracy` is the policy's share of right completions, which one constant answer may exceed; None if it is not measured.
    """
    rows = [prompt for prompt in prompts if (prompt.answer or "").strip()]
    if not rows:
        return References("not applicable: the data has none (answer_column)")
    ((most, count),) = Counter(_answer(prompt).strip() for prompt in rows).most_common(1)
    share, found = count / len(rows), list(_in_the_prompt(_spread(rows, _PROMPTS)))
    note = f"{share:.1%} of {len(rows)} reference answers are {shorten(most)}, the most frequent one"
    if accuracy is not None and share >= _CONSTANT and share > accuracy:
        text = f"{note}, but only {accuracy:.1%} of the completions are right: always giving this answer would earn more"
        found.append(Finding("constant", text, "use fewer rows with this answer, and compare accuracy with that share"))
    return References(note, tuple(found))


def _in_the_prompt(prompts: list[Prompt]) -> Iterator[Finding]:
    """Whether all prompts contain their own answer, and few contain another row's, as prompts with answer options do."""
    texts = [_text(prompt) for prompt in prompts]
    others = [(text, other) for row, text in enumerate(texts) if (other := _other(prompts, row)) is not None]
    shown = all(_contains(text, _answer(prompt)) for text, prompt in zip(texts, prompts, strict=True))
    if not shown or sum(_contains(*pair) for pair in others) >= len(others) / 2:
        return
    same = _shared(texts) + _shared([text[::-1] for text in texts])
    whole = all(2 * len(_answer(prompt)) >= len(text) - same for text, prompt in zip(texts, prompts, strict=True))
    text = f"the prompts of all {len(prompts)} rows tried contain their reference answer (first {prompts[0].place}, "
    remedy = "check that data.source.answer_column is right and data.format does not write it, unless the task is to copy it"
    yield Finding("copy", f"{text}{shorten(_answer(prompts[0]))})", remedy, "warning" if whole else "note")


def _shared(texts: Sequence[str]) -> int:
    """Number of leading characters that all texts share."""
    return sum(1 for _ in takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False)))


def _contains(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text) is not None


def has_paid(generation: Generation, rollout: Rollout) -> bool:
    """Whether the reward has paid for completions: more than 0 or, if it is never above 0, for some more than for others.

    What counts are the parts that measure correctness or, without such a part, the sum of all parts.
    """
    least = _least(generation, rollout.scored.of_counted())
    return len(least) > 0 and float(least.max()) > min(0.0, float(least.min()))


def reference_rewards(
    generation: Generation, prompts: Sequence[Prompt], form: PromptFormat | None, count: int, pays: bool
) -> References:
    """Score the reference answers of `count` training prompts, evenly spread; random states stay unchanged.

    `form` is the data's format; its few-shot examples show how answers are written. `pays` is True if the reward has paid for
    completions of the policy (see `has_paid`), possibly for a form that is not known here. If no part of the reward measures
    correctness, reference answers need not be paid, and what is found are notes.
    """
    some = [prompt for prompt in _spread(prompts, count) if prompt.completions or (prompt.answer or "").strip()]
    if generation.episodes is not None:
        return References("not applicable: the reward of an episode depends on its environment or agent")
    if not some:
        return References("not applicable: the data has no reference answers (answer_column)")
    state = capture_random_state()
    try:
        return _tried(generation, some, form, pays)
    except HybridLightningError as error:
        if isinstance(error, JudgeError) or isinstance(error.__cause__, OSError):  # of a server, or of a file
            text = f"reference answers could not be scored, which is no fault of theirs: {error}"
            return References("could not be scored", (Finding("judge", text, "see that the reward's server answers"),))
        finding = Finding("reference", f"the reward fails on a reference answer: {error}", "correct the reward or the row")
        return References("the reward fails", (finding,))
    finally:
        restore_random_state(state)


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    return [prompts[len(prompts) * place // count] for place in range(count)] if len(prompts) > count else list(prompts)


def _tried(generation: Generation, prompts: list[Prompt], form: PromptFormat | None, pays: bool) -> References:
    asked = [list(_asked(prompt, form)) for prompt in prompts]
    best = _best(generation, prompts, asked)
    scored = [row for row, one in enumerate(best) if not math.isnan(one.value)]
    failed = "" if len(scored) == len(best) else f"{len(best) - len(scored)} could not be scored"
    if not scored:
        return References(failed)
    prompts, asked, best = ([side[row] for row in scored] for side in (prompts, asked, best))  # type: ignore[assignment]
    shown = next((one.text for one in best if one.paid), asked[0][0])
    missing = [row for row, one in enumerate(best) if not one.paid]
    earned, beaten = len(prompts) - len(missing), _beaten(best)
    note = f"{earned} of {len(prompts)} reference answers are paid, such as {shorten(shown)}{failed and f'; {failed}'}"
    if not missing:
        found = list(_paid_by_accident(generation, prompts, [one.text for one in best]))
    elif beaten and (earned or pays):
        found = [_accident(prompts, beaten, len(prompts))]
    else:
        found = [_missing(generation, prompts, asked, [prompts[row] for row in missing], pays)]
    if not generation.measures_correctness:
        found = [replace(finding, level="note") for finding in found]
    return References(note, tuple(found))


def _missing(
    generation: Generation, prompts: list[Prompt], asked: Sequence[Sequence[str]], missing: list[Prompt], pays: bool
) -> Finding:
    """The finding about reference answers that earn nothing in the forms that their prompts require, `asked`."""
    tried, zero = f"{missing[0].place}, {shorten(_answer(missing[0]))}", "your reward gives the reference answer 0"
    earned = len(prompts) - len(missing)
    forms = [[make(_answer(prompt)) for make in _FORMS.values()] for prompt in prompts]
    elsewhere = [] if earned else [one.text for one in _best(generation, prompts, forms) if one.paid]
    level: Literal["error", "warning", "note"]
    if earned:
        text = f"your reward pays nothing for the reference answers of {len(missing)} of {len(prompts)} rows, first {tried}"
        remedy, level = "correct these rows, or the reward's pattern", "warning" if len(missing) > earned else "note"
    elif elsewhere:
        text = f"{zero} in the form that the prompt requires, {shorten(asked[0][0])}, and pays for {shorten(elsewhere[0])}"
        remedy, level = "let the prompt require that form, or change the reward's pattern", "warning"
    elif pays:
        text = f"{zero} in all known forms, though it pays for completions ({tried})"
        remedy, level = "check that the prompt requires the form that the reward pays for", "note"
    else:
        text = f"{zero}: it cannot pay for anything ({len(prompts)} rows tried, first {tried})"
        remedy, level = "correct the reward, or the answer_column of data.source", "error"
        if _has_pattern(generation):
            text = f"{zero} in all known forms ({len(prompts)} rows tried, first {tried})"
            remedy, level = "check that the reward's pattern finds the answer in the form that the prompt requires", "warning"
    return Finding("reference", text, remedy, level)


def _paid_by_accident(generation: Generation, prompts: list[Prompt], texts: Sequence[str]) -> Iterator[Finding]:
    """Find whether wrong answers are paid as well as right ones."""
    right = _values(generation, prompts, texts)
    wrong = _of_other_answers(generation, prompts, dict(enumerate(texts)))
    rows = [row for row, value in wrong.items() if value >= right[row]]
    if len(rows) > len(wrong) / 2:
        yield _accident(prompts, rows, len(wrong))


def _accident(prompts: list[Prompt], rows: list[int], count: int) -> Finding:
    """The finding that the answers of other rows are paid as much as their own in these rows, of `count`."""
    first = prompts[rows[0]]
    text = (
        f"your reward pays as much for another row's answer as for the row's own in {len(rows)} of {count} rows (first "
        f"{first.place}, {shorten(_other(prompts, rows[0]))} for {shorten(_answer(first))}): it does not check the answer"
    )
    return Finding("accident", text, "let the reward compare with the row's answer, if there is a right answer")


@dataclass(frozen=True)
class _Scored:
    """A completion made of a reference answer."""

    text: str
    value: float = math.nan  # nan: it could not be scored
    paid: bool = False
    other: float = math.nan  # what another row's answer earns in its place, if that was needed


def _best(generation: Generation, prompts: list[Prompt], forms: Sequence[Sequence[str]]) -> list[_Scored]:
    """For each prompt, its first paid completion; if none is paid, its last completion.

    A completion is paid if it earns more than 0 from every part that measures correctness. For rewards that are never above 0, it
    is paid if it earns more than another row's answer in the same place.
    """
    best = [_Scored(texts[-1]) for texts in forms]
    for number in range(max(map(len, forms))):
        rows = [row for row, texts in enumerate(forms) if not best[row].paid and number < len(texts)]
        values = _values(generation, [prompts[row] for row in rows], [forms[row][number] for row in rows])
        unpaid = {row: forms[row][number] for row, value in zip(rows, values, strict=True) if value <= 0}
        controls = _of_other_answers(generation, prompts, unpaid)
        for row, value in zip(rows, values, strict=True):
            other = controls.get(row, math.nan)
            best[row] = _Scored(forms[row][number], value, value > 0 or value > other, other)
    return best


def _beaten(best: Sequence[_Scored]) -> list[int]:
    """Rows whose answer another row's answer beats, if that explains why answers are not paid: the reward does not check them.

    A reward that checks answers never pays more for another row's. Equal losses may be those of a single malformed row.
    """
    unpaid = [row for row, one in enumerate(best) if not one.paid]
    less = [row for row in unpaid if best[row].other > best[row].value]
    same = [row for row in unpaid if best[row].other == best[row].value < 0]
    never_above_0 = all(one.value <= 0 for one in best)
    explained = (less and never_above_0) or 2 * len(less) >= len(unpaid) or 2 * len(same) > len(best)
    return sorted([*less, *same]) if explained else []


def _of_other_answers(generation: Generation, prompts: list[Prompt], texts: Mapping[int, str]) -> dict[int, float]:
    """Rewards of texts (row -> text) with another row's answer in place of the row's own, if answers differ."""
    wrong = {row: other for row in texts if (other := _other(prompts, row)) is not None}
    written = [texts[row].replace(_answer(prompts[row]), other) for row, other in wrong.items()]
    return dict(zip(wrong, _values(generation, [prompts[row] for row in wrong], written), strict=True))


def _values(generation: Generation, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """The lowest reward of each text among the parts that measure correctness."""
    if not texts:
        return []
    assert generation.reward is not None
    completions = [_completion(generation, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    least: list[float] = _least(generation, evaluate_reward(generation.reward, completions, prompts)).tolist()
    return least


def _least(generation: Generation, rewards: Rewards) -> Tensor:
    """The lowest value of each completion among the parts that measure correctness, or else the sum of all parts."""
    terms = generation.reward_terms()
    right = [rewards.parts[term.name] for term in terms if term.measures_correctness] or [rewards.total]
    least = torch.stack(right).amin(dim=0)
    return least if rewards.counted is None else least.masked_fill(~rewards.counted, math.nan)


def _other(prompts: list[Prompt], row: int) -> str | None:
    """The answer of another row; None if all rows have the same answer."""
    mine = _answer(prompts[row])
    return next((other for prompt in prompts[row + 1 :] + prompts[:row] if (other := _answer(prompt)) != mine), None)


def _asked(prompt: Prompt, form: PromptFormat | None) -> Iterator[str]:
    """The reference answer in the forms that a prompt may require, the most likely one first."""
    yield from prompt.completions[:1]
    answer = prompt.answer
    if answer is None:
        return
    form = form.formats.get(prompt.set_name) if isinstance(form, FormatBySet) else form
    if form is not None and form.examples:
        with suppress(HybridLightningError):  # rows may not have a column that the examples have
            yield fill_template("answer_template", form.answer_template, {**prompt.columns, "answer": answer}, prompt.place)
    yield from (make(answer) for name, make in _FORMS.items() if name in _text(prompt))
    yield answer


def _has_pattern(generation: Generation) -> bool:
    """Whether a term of the reward finds answers by a pattern, which may be unlike all known forms."""
    scorers = [scorer for term in generation.reward_terms() for scorer in (term, *getattr(term, "scorers", ()))]
    return any(getattr(scorer, "pattern", None) is not None for scorer in scorers)


def _text(prompt: Prompt) -> str:
    return prompt.text or "\n".join(message["content"] for message in prompt.messages or ())


def _answer(prompt: Prompt) -> str:
    return prompt.completions[0] if prompt.completions else str(prompt.answer)


def _completion(generation: Generation, prompt: Prompt, text: str) -> Completion:
    """A text as if the policy had sampled it to its end."""
    thinking = generation.policy.pretrained.encoder.render(prompt).rstrip().endswith("<think>")
    whole = f".\n</think>\n{text}" if thinking else text
    tokens = len(whole)
    with suppress(Exception):  # incomplete tokenizers raise no specific class
        tokens = len(generation.policy.pretrained.tokenizer(whole, add_special_tokens=False)["input_ids"])
    return Completion(whole, tokens + 1, finished=True, thinking=thinking)

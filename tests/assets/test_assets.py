import re
from collections import Counter

import pytest
import torch
from tiny_models import runner_of, tokens_of
from tiny_runs import build_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.embedded_policy import (
    CorpusSource,
    EpisodeCorpus,
    build_model,
    build_tokenizer,
    pretrain_on,
)
from benchmarks.study.policies import RECIPES
from hybrid_lightning.assets import EMBEDDED, embedded_policy_path
from hybrid_lightning.data import ProductSource
from hybrid_lightning.data.arithmetic import FACTORS, hashed_split, worked_answer
from hybrid_lightning.environments import EpisodeLimits, GuessNumber, PlainCalls, ToolEnvironment, calculator
from hybrid_lightning.rewards import ExactMatch, FinalAnswer
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt


def split_line(question, answer):
    """Operands, cue, partial products (None for a direct answer) and result of a line, read without the code that made it."""
    a, rest = question.split("*")
    partial_products = None
    if answer.startswith("["):
        working, answer = answer[1:].split("]")
        partial_products = working.split(" ")
    return int(a), int(rest[:-1]), rest[-1], partial_products, int(answer)


@pytest.mark.parametrize(
    ("model", "recipe", "most"),
    [("embedded", "products", 4e6), ("embedded:episodes", "episodes", 1e6), ("embedded:teacher", "products", 2e6)],
)
def test_shipped_files_are_small_safetensors_and_a_tokenizer_of_what_the_code_builds(model, recipe, most):
    path = embedded_policy_path(model)
    files = list(path.iterdir())
    assert sum(file.stat().st_size for file in files) < most
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    dtype = torch.bfloat16 if model == "embedded:teacher" else torch.float32
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in policy.parameters())
    assert policy.get_input_embeddings().weight is not policy.get_output_embeddings().weight
    built_tokenizer = RECIPES[recipe].tokenizer()
    built = RECIPES[recipe].model(built_tokenizer)
    assert tokenizer.get_vocab() == built_tokenizer.get_vocab()
    assert {n: p.shape for n, p in policy.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    generation = GenerationConfig.from_pretrained(path)
    assert generation.eos_token_id == tokenizer.eos_token_id == policy.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id == policy.config.pad_token_id
    assert tokenizer.padding_side == "left" and model in EMBEDDED
    ids, known = tokenizer(RECIPES[recipe].characters).input_ids, RECIPES[recipe].characters
    assert len(ids) == len(known) and tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == known
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("3+4=")


def test_the_corpus_is_right_has_the_shares_that_it_says_and_nothing_that_is_held_out():
    product, rows = ProductSource(), CorpusSource(10_000, seed=0).load().train
    lines = [split_line(row.question, row.columns["completion"]) for row in rows]
    for a, b, _, partial_products, result in lines:
        assert result == a * b and product.split_of(a, b) == "train"
        if partial_products is None:
            continue
        carry = 0
        for digit, partial in zip(reversed(str(a)), partial_products, strict=True):
            assert len(partial) == 2 and int(partial) == int(digit) * b + carry
            carry = int(partial) // 10
        # The answer can be read off the working: the last partial product, and the units of those before.
        assert int("".join([partial_products[-1], *(p[1] for p in partial_products[-2::-1])])) == result
    held_out = ProductSource(seed=7).load()
    asked = {(row.columns["a"], row.columns["b"]) for row in held_out.validation + held_out.test}
    assert not asked & {line[:2] for line in lines}
    worked = {cue: [line[3] is not None for line in lines if line[2] == cue] for cue in ":="}
    assert len(worked[":"]) / len(lines) == pytest.approx(0.6, abs=0.02) and all(worked[":"])
    assert sum(worked["="]) / len(worked["="]) == pytest.approx(0.3, abs=0.02)


def test_all_answers_earn_the_reward_and_no_other_form_does():
    reward = ExactMatch(pattern=r"\A(?:\[[\d ]*\])?(\d+)\Z")
    every = [(a, b) for a in range(10, 1000) for b in FACTORS]
    assert set(reward([worked_answer(a, b) for a, b in every], [Prompt(text="?", answer=str(a * b)) for a, b in every])) == {1.0}
    wrong = ["[42 28 20]", "[42 28 20", "42 28 20]2082", "[42 28 20]2083", "[2082]", "2082]2082", "[1][2]2082", "=2082", ""]
    assert set(reward(wrong, [Prompt(text="347*6=", answer="2082")] * len(wrong))) == {0.0}


def test_pretraining_is_reproducible_and_learns():
    tokenizer, corpus, ends = build_tokenizer(), CorpusSource(24, seed=5), []
    for _ in range(2):
        torch.manual_seed(5)
        ends.append(pretrain_on(build_model(tokenizer), tokenizer, corpus, seed=5, steps=3, batch_size=8, lr=1e-3))
    first, second = ends
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(5)
    start = build_model(tokenizer)
    # Every weight learns, including weights that no adapter would reach.
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters(), strict=True))


def test_the_policy_masters_less_than_half_directly_and_most_when_it_works_as_its_teacher_does():
    rows = ProductSource(validation_size=64).load().validation
    reward = ExactMatch(pattern=r"\A(?:\[[\d ]*\])?(\d+)\Z")
    accuracy = {}
    for name, cue in (("embedded", "="), ("embedded", ":"), ("embedded:teacher", "=")):
        path = embedded_policy_path(name)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float().eval(), AutoTokenizer.from_pretrained(path)
        prompts = [Prompt(text=row.question.replace("=", cue), answer=row.answer) for row in rows]
        ids = [tokenizer(prompt.text).input_ids for prompt in prompts]
        request = SamplingRequest(prompts, ids, greedy=True)
        rollouts = Sampler(max_new_tokens=20).sample(runner_of(model), tokenizer, request)
        accuracy[name, cue] = sum(reward(rollouts.completions, prompts)) / len(prompts)
    assert accuracy["embedded", "="] < 0.5
    assert accuracy["embedded", ":"] > 0.6
    assert accuracy["embedded:teacher", "="] > 0.9


def test_the_corpus_of_episodes_is_right_and_has_the_shares_that_it_says():
    """Each turn of a product is read without the code that made it, after the text before it."""
    kinds = Counter()
    for row in EpisodeCorpus(20_000, seed=0).load().train:
        before, turn = row.question, row.columns["completion"]
        if before[0] == "?":  # a game
            assert re.fullmatch(r"\?(\d+<eos>[<>]){0,4}", before) and 1 <= int(turn) <= 31
            continue
        asked, _, rest = before.partition("=")
        a, b = map(int, asked.split("*"))
        assert 100 <= a <= 999 and 10 <= b <= 99 and hashed_split(asked) == "train"
        assert rest in ("", f"[{asked}]<eos>{a * b}") and turn in ((str(a * b),) if rest else (str(a * b), f"[{asked}]"))
        kinds["called" if turn == f"[{asked}]" else "copied" if rest else "direct"] += 1
    assert kinds["called"] == pytest.approx(kinds["copied"], abs=1)
    assert kinds["called"] / (kinds["called"] + kinds["direct"]) == pytest.approx(0.4, abs=0.02)


def test_the_policy_for_episodes_has_something_to_learn_and_a_way_to_it():
    """It calls and guesses in the form of its corpus, and solves less than half."""
    limits = {"model": "embedded:episodes", "turn_template": "{content}", "sampler": Sampler(max_new_tokens=12)}
    rows = ProductSource(100, 999, validation_size=100, low_factor=10, high_factor=99).load().validation
    tools = build_policy(
        reward=FinalAnswer(ExactMatch(pattern=r"\A(\d+)\Z")),
        environment=ToolEnvironment([calculator], PlainCalls(r"\A\[([1-9]\d*\*[1-9]\d*)\]\Z")),
        episodes=EpisodeLimits(max_turns=3, max_tokens=48),
        **limits,
    )
    game = build_policy(
        reward=None,
        environment=GuessNumber(1, 31, rules="", higher=">", lower="<", right="=", invalid="?"),
        episodes=EpisodeLimits(max_turns=5, max_tokens=60),
        **limits,
    )
    products = [Prompt(text=row.question, answer=row.answer, index=row.index) for row in rows]
    games = [Prompt(text="?", index=number, columns={"seed": number}) for number in range(100)]
    forms = r"\?(\d+<eos>[<>]){0,4}\d+<eos>", r"(\d+\*\d+)=(\[\1\]<eos>\d+)?\d+<eos>"
    for policy, prompts, form in ((game, games, forms[0]), (tools, products, forms[1])):
        rollouts = policy.generate(prompts, 4, PromptDraws(prompts, 4, 0))
        solved = policy.task.generation.score(rollouts).scored.total.flatten()
        assert 0.3 < solved.mean() < 0.5
        texts = ["".join(map(policy.tokenizer.decode, tokens_of(rollouts.sequences, row))) for row in range(400)]
        assert sum(re.fullmatch(form, text) is not None for text in texts) > 380
        if policy is tools:
            called = torch.tensor(["[" in text for text in texts])
            assert 0.3 < called.float().mean() < 0.5 and solved[called].mean() > 0.9 and solved[~called].mean() < 0.05

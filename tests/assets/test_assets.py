import random

import pytest
import torch
from tiny_models import engine_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.embedded_policy import CHARACTERS, CorpusSource, build_model, build_tokenizer, corpus_line, pretrain_on
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.data import ProductSource
from hybrid_lightning.data.arithmetic import FACTORS, worked_answer
from hybrid_lightning.rewards import ExactMatch
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.types import Prompt


@pytest.fixture(scope="module")
def policy():
    path = embedded_policy_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    return [corpus_line(rng) for _ in range(20_000)]


def split_line(question, answer):
    """Operands, cue, partial products (None for a direct answer) and result of a line, read without the code that made it."""
    a, rest = question.split("*")
    partial_products = None
    if answer.startswith("["):
        working, answer = answer[1:].split("]")
        partial_products = working.split(" ")
    return int(a), int(rest[:-1]), rest[-1], partial_products, int(answer)


def test_shipped_files_are_small_float32_safetensors_of_what_the_code_builds(policy):
    files = list(embedded_policy_path().iterdir())
    assert sum(file.stat().st_size for file in files) < 8_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    model, tokenizer = policy
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    built_tokenizer = build_tokenizer()
    built = build_model(built_tokenizer)
    assert tokenizer.get_vocab() == built_tokenizer.get_vocab()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    generation = GenerationConfig.from_pretrained(embedded_policy_path())
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", [CHARACTERS, "347*6=", "[42 28 20]2082", "10*2:[00 02]20"])
def test_text_survives_the_tokenizer(policy, text):
    _, tokenizer = policy
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.pad_token_id, *ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_a_character_that_the_policy_does_not_know_is_an_error(policy):
    with pytest.raises(Exception, match="WordLevel"):
        policy[1]("3+4=")


def test_every_line_of_the_corpus_is_right(corpus):
    for question, answer in corpus:
        a, b, _, partial_products, result = split_line(question, answer)
        assert result == a * b
        if partial_products is None:
            continue
        carry = 0
        for digit, partial in zip(reversed(str(a)), partial_products, strict=True):
            assert len(partial) == 2 and int(partial) == int(digit) * b + carry
            carry = int(partial) // 10
        # The answer can be read off the working: the last partial product, and the units of those before.
        assert int("".join([partial_products[-1], *(p[1] for p in partial_products[-2::-1])])) == result


def test_no_line_of_the_corpus_is_held_out_and_it_has_the_shares_that_it_says(corpus):
    asked = {split_line(*line)[:2] for line in corpus}
    assert all(ProductSource().split_of(a, b) == "train" for a, b in asked)
    held_out = ProductSource(seed=7).load()
    assert not asked & {(row.columns["a"], row.columns["b"]) for row in held_out.validation + held_out.test}
    lines = [split_line(*line) for line in corpus]
    with_cue = [line for line in lines if line[2] == ":"]
    without = [line for line in lines if line[2] == "="]
    assert len(with_cue) / len(lines) == pytest.approx(0.6, abs=0.02)
    assert all(line[3] is not None for line in with_cue)
    assert sum(line[3] is not None for line in without) / len(without) == pytest.approx(0.3, abs=0.02)


def test_all_answers_fit_into_the_config_and_earn_the_reward():
    reward = ExactMatch(pattern=r"\A(?:\[[\d ]*\])?(\d+)\Z")
    every = [(a, b) for a in range(10, 1000) for b in FACTORS]
    answers = [worked_answer(a, b) for a, b in every]
    prompts = [Prompt(text=f"{a}*{b}=", answer=str(a * b)) for a, b in every]
    assert max(map(len, answers)) == 14
    assert set(reward(answers, prompts)) == {1.0}
    prompt = Prompt(text="347*6=", answer="2082")
    wrong = ["[42 28 20]", "[42 28 20", "42 28 20]2082", "[42 28 20]2083", "[2082]", "2082]2082", "[1][2]2082", "=2082", ""]
    assert set(reward(wrong, [prompt] * len(wrong))) == {0.0}


def test_rows_are_the_lines_of_the_corpus():
    rows = CorpusSource(lines=16, seed=3).load().train
    lines = random.Random(3)
    assert [(row.question, row.columns["completion"]) for row in rows] == [corpus_line(lines) for _ in range(16)]


def test_pretraining_is_reproducible_and_learns():
    tokenizer, corpus, ends = build_tokenizer(), CorpusSource(24, seed=5), []
    for _ in range(2):
        torch.manual_seed(5)
        ends.append(pretrain_on(build_model(tokenizer), tokenizer, corpus, seed=5, steps=3, batch_size=8, lr=1e-3))
    first, second = ends
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(5)
    start = build_model(tokenizer)
    # Every weight learns, those that no adapter would reach included.
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters(), strict=True))


def test_the_policy_masters_less_than_half_directly_and_most_when_it_works(policy):
    model, tokenizer = policy
    rows = ProductSource(validation_size=64).load().validation
    reward = ExactMatch(pattern=r"\A(?:\[[\d ]*\])?(\d+)\Z")
    accuracy = {}
    for cue in "=:":
        prompts = [Prompt(text=row.question.replace("=", cue), answer=row.answer) for row in rows]
        ids = [tokenizer(prompt.text).input_ids for prompt in prompts]
        rollouts = Sampler(max_new_tokens=20).sample(engine_of(model), tokenizer, prompts, ids, 1, greedy=True)
        accuracy[cue] = sum(reward(rollouts.completions, prompts)) / len(prompts)
    assert accuracy["="] < 0.5
    assert accuracy[":"] > 0.6

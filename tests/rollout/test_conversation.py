"""Episodes of several turns: each message equals the message from one long pass over its context, whichever episodes continue."""

import pytest
import torch
from test_segment_decoding import Recording
from tiny_decoders import SPECIAL, OfAccelerator, fused, special_model
from tiny_decoders import build as build_adapted
from tiny_models import SIZES, build_model, runner_of
from transformers import MistralConfig

from hybrid_lightning.rollout.interface import MessageRequest, SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import Session
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.runner import Backend, ModelRunner, decoding_of, segment_decoding
from hybrid_lightning.types import Prompt

TEXTS, SAMPLES, CAPACITY = ("12+3=", "what is 7 plus 15?\n", "9="), 3, 60
PROMPTS = [Prompt(text=text, index=place) for place, text in enumerate(TEXTS)]
# Episodes that continue: all but one, one that had paused, and some again.
ROWS = ([0, 1, 2, 4, 5, 6, 7, 8], [1, 3, 6, 7], [0, 1, 3, 6])


def added_to(row, turn):
    """Token ids; one episode gets none."""
    return [3 + (7 * row + turn + place) % 40 for place in range((3 * row + turn) % 6)]


def play(begin, runner, tokenizer, rows=ROWS, capacity=CAPACITY, limits=None, **settings):
    """Turns of episodes: each one's number, message, log-probabilities, and the text before it."""
    ids = [tokenizer(text).input_ids for text in TEXTS]
    sampler = Sampler(**{"max_new_tokens": 12, "stop": ["7", "3"], **settings})
    contexts = [list(ids[row // SAMPLES]) for row in range(len(TEXTS) * SAMPLES)]
    request, turns = SamplingRequest(PROMPTS, (), SAMPLES, PromptDraws(PROMPTS, SAMPLES, 3)), []
    messages, asked = [0] * len(contexts), limits or [sampler.max_new_tokens] * len(contexts)

    def sample(rows):
        turn, prompts = [], [len(ids[row // SAMPLES]) for row in rows]
        room = [min(asked[row], capacity - len(contexts[row]) + prompt) for row, prompt in zip(rows, prompts, strict=True)]
        requests = [MessageRequest(row, messages[row], contexts[row], most) for row, most in zip(rows, room, strict=True)]
        for row, one in zip(rows, session.sample(requests), strict=True):
            turn.append((row, one.ids, torch.tensor(one.logprobs), contexts[row], one.completion.finished))
            contexts[row], messages[row] = [*contexts[row], *one.ids], messages[row] + 1
        turns.append(turn)

    with torch.no_grad(), runner.sampling():
        session = begin(sampler, runner, tokenizer, request, capacity)
        sample(range(len(contexts)))
        for number, going_on in enumerate(rows):
            for row in going_on:
                contexts[row] = [*contexts[row], *added_to(row, number)]
            if going_on:
                sample(going_on)
            else:
                turns.append([])
    return turns


def assert_of_whole_contexts(model, turns):
    for _, tokens, logprobs, context, _ in (message for turn in turns for message in turn):
        logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


def messages_of(turns):
    return [[(row, tokens, finished) for row, tokens, _, _, finished in turn] for turn in turns]


def test_a_message_does_not_depend_on_which_other_episodes_go_on(tokenizer):
    runner = runner_of(build_model("llama"))
    together = play(Sampler.session, runner, tokenizer)
    alone = play(Sampler.session, runner, tokenizer, [[6] if 6 in rows else [] for rows in ROWS])
    of_sixth = [[message for message in turn if message[0] == 6] for turn in messages_of(together)]
    assert messages_of(alone)[1:] == of_sixth[1:]


def test_what_is_left_of_the_capacity_is_each_episodes_own_limit(tokenizer):
    runner = runner_of(build_model("llama"))
    ids = [tokenizer(text).input_ids for text in TEXTS]
    free, cut = (play(Sampler.session, runner, tokenizer, ROWS[:1], given, stop=["7"]) for given in (CAPACITY, 18))
    said = {row: len(context) + len(tokens) - len(ids[row // SAMPLES]) for row, tokens, _, context, _ in cut[1]}
    for (row, tokens, finished), (_, whole, ended) in zip(messages_of(cut)[1], messages_of(free)[1], strict=True):
        assert tokens == whole[: len(tokens)] and finished == (ended and len(whole) == len(tokens))
        assert said[row] <= 18 and (len(tokens) == len(whole) or said[row] == 18)
    assert {finished for _, _, finished in messages_of(cut)[1]} == {True, False}
    limits = [1, 6, 11, *range(2, 2 + (len(TEXTS) - 1) * SAMPLES)][: len(TEXTS) * SAMPLES]
    (first,) = play(Sampler.session, runner, tokenizer, [], limits=limits, stop=[])
    lengths = [len(tokens) for _, tokens, *_ in first]
    assert all(length <= limit for length, limit in zip(lengths, limits, strict=True)) and max(lengths) > 6


# Windows that hide all of a prompt, and some of it; heads for which there is a kernel.
MODELS = {family: lambda family=family: build_model(family) for family in ("llama", "qwen3", "gpt2")}
MODELS |= {family: lambda family=family: special_model(SPECIAL[family]) for family in ("mistral", "gemma2")}
MODELS["wide window"] = lambda: special_model(MistralConfig(**SIZES, sliding_window=16, head_dim=8))
MODELS["heads of 32"] = lambda: build_model("llama", hidden_size=128)
MODELS["heads of 32, window"] = lambda: special_model(MistralConfig(**{**SIZES, "hidden_size": 128}, sliding_window=16))


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "wide window", "heads of 32", "heads of 32, window"])
def test_messages_are_as_for_whole_contexts_whatever_the_model(tokenizer, name, monkeypatch):
    monkeypatch.setattr(Session, "sample", None)  # no whole context as a longer prompt
    model = MODELS[name]()
    turns = play(Sampler.session, ModelRunner(model), tokenizer, stop=["7", "3", "a", "z"])
    assert_of_whole_contexts(model, turns)
    assert len({len(tokens) for turn in turns for _, tokens, *_ in turn}) > 3


WAYS = [("qwen3", "segments"), ("qwen3", "graphs"), ("gpt2", "segments"), ("wide window", "segments"), ("mistral", "segments")]


@pytest.mark.parametrize(("name", "way"), [*WAYS, ("gpt2", "cache"), ("wide window", "cache")])
def test_messages_on_accelerators_and_by_a_cache_of_transformers_too(tokenizer, name, way, monkeypatch):
    """By segments, with and without graphs, or by a kernel with a mask where windows hide prompts."""
    recording = Recording(monkeypatch)
    monkeypatch.setattr(segment_decoding, "_LASTING", 1)
    if way == "cache":
        monkeypatch.setattr(ModelRunner, "packs", False)
    if (name, way) != ("wide window", "cache"):  # which cannot leave out columns, and is made again
        monkeypatch.setattr(Session, "sample", None)
    model = MODELS[name]()
    runner = ModelRunner(model, Backend() if way == "cache" else OfAccelerator())
    assert_of_whole_contexts(model, play(Sampler.session, runner, tokenizer, cuda_graphs=way == "graphs"))
    assert bool(recording.notes) == (way == "graphs")


def test_adapted_models_go_on_as_by_longer_prompts_which_any_engine_can(tokenizer):
    runner = fused(build_adapted("qwen3").model)
    again, going_on = (play(begin, runner, tokenizer) for begin in (Session, Sampler.session))
    assert messages_of(going_on) == messages_of(again)
    with torch.no_grad():
        assert_of_whole_contexts(runner.model, again)


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("backend", [Backend, OfAccelerator])
def test_a_row_that_runs_on_after_its_end_stays_in_its_own_room(backend):
    model = MODELS["heads of 32"]()
    runner, mask = ModelRunner(model, backend()), torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad(), runner.sampling():
        decoding = decoding_of(runner, torch.tensor([[5, 6, 7]]), mask, 8, keeps_rows=True)
        decoding.prefill(2)
        for token in (8, 9, 10):
            decoding.step(torch.tensor([token, token]))
        decoding.extend([0, 1], [2, 2], [[11] * 6, [12]])
        for token in (13, 14, 15):
            logits = decoding.step(torch.tensor([token, token]))
    expected = model(torch.tensor([[5, 6, 7, 8, 9, 12, 13, 14, 15]])).logits[0, -1]
    torch.testing.assert_close(logits[1], expected, atol=1e-4, rtol=0)

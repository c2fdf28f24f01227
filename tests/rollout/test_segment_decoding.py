"""Decoding as on an accelerator, run on a CPU: the same completions as `SharedPromptDecoding`, and no wait for the device."""

import math
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fake_cuda.fake_gpu import counter
from tiny_decoders import OfAccelerator, fused
from tiny_decoders import build as build_adapted
from tiny_models import FAMILIES, build_model

from hybrid_lightning.engine import Backend, Engine, compiling, decoder, decoding_of, segment_decoding
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout import sampler as sampling
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import Sampler, draw_by_integers, draw_tokens
from hybrid_lightning.types import Prompt

TEXTS = ("12+3=", "what is 7 plus 15?\n", "9=", "1+")
PROMPTS = [Prompt(text=text, index=place) for place, text in enumerate(TEXTS)]


def sample(engine, tokenizer, length=24, samples=5, **settings):
    ids = [tokenizer(text).input_ids for text in TEXTS]
    request = SamplingRequest(PROMPTS, ids, samples, PromptDraws(PROMPTS, samples, 3))
    return Sampler(max_new_tokens=length, **settings).sample(engine, tokenizer, request)


@pytest.mark.parametrize("family", [*FAMILIES, "adapted and fused"])
def test_all_families_sample_alike(tokenizer, family):
    """Rows end early, at one of two characters, so that slots are given up again and again."""

    def engine(backend):
        return Engine(build_model(family), backend) if family in FAMILIES else fused(build_adapted("llama").model, backend)

    shared, segments = (sample(engine(backend), tokenizer, stop=["7", "3"]) for backend in (Backend(), OfAccelerator()))
    assert torch.equal(shared.sequences.completion_ids, segments.sequences.completion_ids)
    assert torch.equal(shared.finished, segments.finished) and shared.completions == segments.completions
    lengths = segments.sequences.completion_mask.sum(1)
    assert int(lengths.min()) < 5 and len(lengths.unique()) > 4
    assert torch.allclose(shared.sampling_logprobs, segments.sampling_logprobs, atol=1e-5, rtol=0)


def test_no_key_moves_and_no_tensor_of_a_step_is_made_anew(tokenizer):
    """What a graph of a step would read has the same place at every token, until rows are given up."""
    engine = Engine(build_model("llama"), OfAccelerator())
    ids, mask = torch.randint(3, 30, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad(), engine.sampling():
        decoding = decoding_of(engine, ids, mask, 8)
        decoding.prefill(3)
        places = []
        for step in range(6):
            if step == 3:
                decoding.select(torch.tensor([0, 2, 5]))
            decoding.step(torch.full((3 if step >= 3 else 6,), 7))
            caches = [part.data_ptr() for pair in (*decoding.own.values(), *decoding.prompt.values()) for part in pair]
            places.append((caches, decoding.used.data_ptr(), decoding.places.data_ptr(), decoding.positions.data_ptr()))
    assert places[0] == places[1] == places[2] and places[3] == places[4] == places[5]
    assert places[0][0] == places[5][0]
    assert decoding.used.tolist() == [6, 6, 6] and decoding.slots.tolist() == [0, 2, 5]


def test_no_token_waits_for_the_device(tokenizer, monkeypatch, every=4):
    """The number of running rows is known late, and still no completion differs."""
    engine = Engine(build_model("llama"), OfAccelerator())
    expected = sample(engine, tokenizer, 40)
    monkeypatch.setattr(torch, "Event", Mock())
    made = sampling._Running.__init__

    def late(self, rows, device):
        made(self, rows, device)
        self._every = every

    monkeypatch.setattr(sampling._Running, "__init__", late)
    waits, waiting = [], counter()
    for length in (72, 40):
        with waiting() as counted:
            found = sample(engine, tokenizer, length)
        waits.append(len(counted.counts.syncs))
    assert torch.equal(found.sequences.completion_ids, expected.sequences.completion_ids)
    assert torch.allclose(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5, rtol=0)
    assert waits[0] == waits[1] <= 20, "the number of waits does not depend on the number of tokens"


def test_integers_draw_what_floats_draw_and_no_token_of_probability_zero():
    torch.manual_seed(0)
    for width in (1000, 1024, 151, 640):
        logits = 3 * torch.randn(200, width)
        uniform = torch.rand(200, 1, dtype=torch.float64)
        token, logprob = draw_by_integers(logits, uniform, 0.7)
        expected = draw_tokens(logits / 0.7, uniform)
        assert (token != expected).sum() <= 1, "one number may lie between two tokens, where both ways round"
        wanted = (logits / 0.7).log_softmax(1).gather(1, token[:, None]).squeeze(1)
        assert torch.allclose(logprob, wanted, atol=1e-5, rtol=0)
    logits = torch.full((64, 300), float("-inf"))
    logits[:, 7], logits[:, 290] = 0.0, -1.0
    uniform = torch.linspace(0, 1, 65, dtype=torch.float64)[:64, None]
    uniform[-1] = 1 - 2**-53
    token, _ = draw_by_integers(logits, uniform, 1.0)
    share = 1 / (1 + math.exp(-1))
    assert set(token.tolist()) == {7, 290} and abs(float((token == 7).float().mean()) - share) < 0.03


def test_compiled_layers_sample_alike_and_a_token_takes_few_calls_from_the_host(tokenizer, monkeypatch, traced):
    """Of Python functions and of operators, in the sampler's loop and its layers; of compiled bodies alone those around them."""
    ours, calls, seen = str(Path(compiling.__file__).parents[1]), Counter(), []
    expected = sample(fused(build_adapted("qwen3").model, OfAccelerator()), tokenizer, stop=["7", "3"])
    for module in (decoder, compiling):
        monkeypatch.setattr(module, "compiling_pays", lambda device: True)
    monkeypatch.setattr(OfAccelerator, "copies_pay", lambda *_: False)
    engine = fused(build_adapted("qwen3").model, OfAccelerator())

    def count(frame, event, argument):
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(ours):
            calls[event] += 1

    with engine.sampling():
        found = sample(engine, tokenizer, stop=["7", "3"])
        plain, note = Sampler.sample, lambda *_: seen.append(Counter(calls))
        monkeypatch.setattr(Sampler, "sample", lambda self, *given: plain(self, *given[:2], replace(given[2], on_token=note)))
        sys.setprofile(count)
        try:
            sample(engine, tokenizer, 12)
        finally:
            sys.setprofile(None)
    assert traced.count("before_attention") == traced.count("after_attention") == 1, "the same code for all numbers of rows"
    assert not engine._fast.why_not_compiled
    assert torch.equal(found.sequences.completion_ids, expected.sequences.completion_ids)
    assert torch.allclose(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5, rtol=0)
    tokens = [after - before for before, after in pairwise(seen)]
    assert min(token["call"] for token in tokens) <= 65 and min(token["c_call"] for token in tokens) <= 110, "two layers"


class FakeGraph:
    """In place of a CUDA graph: replays by calling the step again, into the same tensors."""

    made = 0

    def __init__(self, step, tokens):
        type(self).made += 1
        self.step, self.tokens, self.result = step, tokens, None

    def replay(self, tokens):
        self.tokens.copy_(tokens)
        result = self.step(self.tokens)
        self.result = result if self.result is None else self.result.copy_(result)
        return self.result


def test_replayed_steps_give_the_same_completions(tokenizer, monkeypatch):
    """A graph for each number of rows; it reads the same tensors at every token."""
    monkeypatch.setattr(segment_decoding, "StepGraph", FakeGraph)
    FakeGraph.made = 0
    engine = Engine(build_model("llama"), OfAccelerator())
    plain, replayed = (sample(engine, tokenizer, 40, stop=["7"], cuda_graphs=on) for on in (False, True))
    assert torch.equal(plain.sequences.completion_ids, replayed.sequences.completion_ids)
    assert torch.allclose(plain.sampling_logprobs, replayed.sampling_logprobs, atol=1e-5, rtol=0)
    assert 1 < FakeGraph.made <= 16 and engine.graphs.passed


def test_graphs_are_given_up_where_they_give_other_numbers_or_cannot_be_made(tokenizer, monkeypatch, caplog):
    """`auto`, as it is on a GPU: the completions are those of plain steps, and it is said once."""

    class Wrong(FakeGraph):
        def replay(self, tokens):
            return super().replay(tokens) * 1.001

    def fails(step, tokens):
        raise RuntimeError("operation not permitted when stream is capturing")

    for made, reason in ((Wrong, "a replayed step gave other logits"), (fails, "RuntimeError: operation not permitted")):
        engine = Engine(build_model("llama"), OfAccelerator())
        plain = sample(engine, tokenizer, stop=["7"])
        assert not engine.graphs.why_not, "auto makes none on a CPU"
        monkeypatch.setattr(segment_decoding, "StepGraph", made)
        monkeypatch.setattr(sampling, "_replays", lambda device: True)
        caplog.clear()
        found = [sample(engine, tokenizer, stop=["7"]) for _ in range(2)]
        assert all(torch.equal(part.sequences.completion_ids, plain.sequences.completion_ids) for part in found)
        assert caplog.text.count("sampled without CUDA graphs") == 1 and reason in engine.graphs.why_not
        with pytest.raises(ConfigError, match=f"sampler.cuda_graphs=true: {reason}"):
            sample(engine, tokenizer, cuda_graphs=True)
        monkeypatch.undo()


@pytest.mark.parametrize(("family", "kind", "why"), [("llama", Backend, "a CPU"), ("mistral", OfAccelerator, "a sliding window")])
def test_graphs_that_cannot_be_are_refused_or_it_is_said_once(tokenizer, monkeypatch, caplog, family, kind, why):
    engine = Engine(build_adapted(family).model, kind())
    engine.prepare()
    monkeypatch.setattr(Engine, "passes", lambda self: {"attention by segments": ""} if why != "a CPU" else {})
    with pytest.raises(ConfigError, match=rf"sampler.cuda_graphs=true: {why}.*; remove it"):
        sample(engine, tokenizer, cuda_graphs=True)
    monkeypatch.setattr(sampling, "_replays", lambda device: True)
    for _ in range(2):
        sample(engine, tokenizer)
    assert caplog.text.count(f"since {why}") == 1


def test_a_graph_is_recorded_once_and_replayed_with_other_tokens(monkeypatch):
    graph, steps, tokens = Mock(), [], torch.zeros(3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    step = segment_decoding.StepGraph(lambda read: steps.append(read) or read + 1, tokens)
    assert step.replay(torch.ones(3)) is step.replay(torch.full((3,), 2.0))
    assert len(steps) == 1 and graph.replay.call_count == 2 and tokens.tolist() == [2.0] * 3

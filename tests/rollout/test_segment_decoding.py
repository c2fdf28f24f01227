"""Decoding as on an accelerator, run on a CPU: the same completions as `SharedPromptDecoding`, and no wait for the device."""

import math
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fake_cuda.fake_gpu import counter
from long_cases import long_but
from runner.test_logprobs import build_sequences
from runner.test_packing import build_sequences as build_many
from tiny_decoders import OfAccelerator, fused
from tiny_decoders import build as build_adapted
from tiny_models import FAMILIES, build_model

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout import sampler as sampling
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import Sampler, draw_by_integers, draw_tokens
from hybrid_lightning.runner import Backend, ModelRunner, compiling, decoder, decoding_of, segment_decoding, step_graphs
from hybrid_lightning.runner.logprobs import token_logprobs
from hybrid_lightning.types import Prompt

TEXTS = ("12+3=", "what is 7 plus 15?\n", "9=", "1+")
PROMPTS = [Prompt(text=text, index=place) for place, text in enumerate(TEXTS)]


def sample(runner, tokenizer, length=24, samples=5, **settings):
    ids = [tokenizer(text).input_ids for text in TEXTS]
    request = SamplingRequest(PROMPTS, ids, samples, PromptDraws(PROMPTS, samples, 3))
    return Sampler(max_new_tokens=length, **settings).sample(runner, tokenizer, request)


@pytest.mark.parametrize("family", [*FAMILIES, "adapted and fused"])
def test_all_families_sample_alike(tokenizer, family):
    """Rows end early, at one of two characters, so that slots are given up again and again."""

    def runner(backend):
        return ModelRunner(build_model(family), backend) if family in FAMILIES else fused(build_adapted("llama").model, backend)

    shared, segments = (sample(runner(backend), tokenizer, stop=["7", "3"]) for backend in (Backend(), OfAccelerator()))
    assert torch.equal(shared.sequences.completion_ids, segments.sequences.completion_ids)
    assert torch.equal(shared.finished, segments.finished) and shared.completions == segments.completions
    lengths = segments.sequences.completion_mask.sum(1)
    assert int(lengths.min()) < 5 and len(lengths.unique()) > 4
    assert torch.allclose(shared.sampling_logprobs, segments.sampling_logprobs, atol=1e-5, rtol=0)


def test_no_key_moves_and_no_tensor_of_a_step_is_made_anew(tokenizer):
    """The inputs of a step's graph have the same addresses at every token, until rows are given up."""
    runner = ModelRunner(build_model("llama"), OfAccelerator())
    ids, mask = torch.randint(3, 30, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad(), runner.sampling():
        decoding = decoding_of(runner, ids, mask, 8)
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
    runner = ModelRunner(build_model("llama"), OfAccelerator())
    expected = sample(runner, tokenizer, 40)
    monkeypatch.setattr(torch, "Event", Mock())
    made = sampling._Running.__init__

    def late(self, rows, device):
        made(self, rows, device)
        self._every = every

    monkeypatch.setattr(sampling._Running, "__init__", late)
    waits, waiting = [], counter()
    for length in (72, 40):
        with waiting() as counted:
            found = sample(runner, tokenizer, length)
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
    """Counts calls of Python functions and operators in the sampler's loop and its layers, but not inside compiled bodies."""
    ours, calls, seen = str(Path(compiling.__file__).parents[1]), Counter(), []
    expected = sample(fused(build_adapted("qwen3").model, OfAccelerator()), tokenizer, stop=["7", "3"])
    for module in (decoder, compiling):
        monkeypatch.setattr(module, "why_not_compiled", lambda device: "")
    monkeypatch.setattr(OfAccelerator, "copies_pay", lambda *_: False)
    runner = fused(build_adapted("qwen3").model, OfAccelerator())

    def count(frame, event, argument):
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(ours):
            calls[event] += 1

    with runner.sampling():
        found = sample(runner, tokenizer, stop=["7", "3"])
        plain, note = Sampler.sample, lambda *_: seen.append(Counter(calls))
        monkeypatch.setattr(Sampler, "sample", lambda self, *given: plain(self, *given[:2], replace(given[2], on_token=note)))
        sys.setprofile(count)
        try:
            sample(runner, tokenizer, 12)
        finally:
            sys.setprofile(None)
    assert traced.count("before_attention") == traced.count("after_attention") == 1, "the same code for all numbers of rows"
    assert not runner._fast.why_not_compiled
    assert torch.equal(found.sequences.completion_ids, expected.sequences.completion_ids)
    assert torch.allclose(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5, rtol=0)
    tokens = [after - before for before, after in pairwise(seen)]
    assert min(token["call"] for token in tokens) <= 65 and min(token["c_call"] for token in tokens) <= 110, "two layers"


def test_two_rollouts_of_unequal_rows_and_their_updates_compile_each_function_once(tokenizer, monkeypatch, traced):
    for module in (decoder, compiling):
        monkeypatch.setattr(module, "why_not_compiled", lambda device: "")
    runner, made = fused(build_adapted("qwen3").model, OfAccelerator()), []
    for samples, length, sequences in ((5, 24, build_sequences("shared")), (3, 17, build_many())):
        with runner.sampling():
            sample(runner, tokenizer, length, samples, stop=["7", "3"])
        token_logprobs(runner, sequences, 1.0)[0].sum().backward()
        made.append(Counter(traced))
    assert made[0] and made[1] == made[0]


class Recording:
    """In place of torch's CUDA graphs: replays by calling the step again, into the same tensors, and fails as they do."""

    def __init__(self, monkeypatch, factor=1.0, fails=()):
        self.factor, self.fails, self.notes, self.streams = factor, fails, [], []
        self.recording, self.allocating = False, []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Mock(capture_begin=self.begin, capture_end=self.end))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "own")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", self.end_allocating)
        monkeypatch.setattr(torch.cuda.memory, "_cuda_releasePool", lambda device, pool: self.notes.append("released"))
        for name in ("empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, Mock(side_effect=AssertionError(name)))
        step, made = segment_decoding.SegmentDecoding._step, step_graphs.StepGraph

        def is_recorded(decoding, tokens):
            """A step that computes nothing where it is recorded."""
            if not self.recording:
                return step(decoding, tokens)
            if "step" in self.fails:
                raise RuntimeError("operation not permitted")
            return torch.zeros(len(tokens), 32)

        def replay(graph, tokens):
            graph._tokens.copy_(tokens)
            return graph._result.copy_(self.step(graph._tokens)).mul_(self.factor)

        def records(whole, read, *room):
            self.step = whole
            return made(whole, read, *room)

        monkeypatch.setattr(segment_decoding.SegmentDecoding, "_step", is_recorded)
        monkeypatch.setattr(made, "replay", replay)
        monkeypatch.setattr(step_graphs, "StepGraph", records)

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def begin(self, pool, capture_error_mode):
        assert self.streams == ["own"] and not self.allocating and capture_error_mode == "thread_local"
        self.allocating.append(pool)
        self.recording = True
        self.notes.append("recorded")

    def end(self):
        assert self.streams == ["own"], "a capture ends in the stream that it began in"
        self.recording = False
        if "end" in self.fails:  # before torch tells its allocator
            raise RuntimeError("operation failed due to a previous error during capture")
        self.end_allocating(None, "pool")

    def end_allocating(self, device, pool):
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to mempool_id")
        self.allocating.remove(pool)


def test_replayed_steps_give_the_same_completions(tokenizer, monkeypatch):
    """A graph for each number of rows that lasts, all in one stream and one pool."""
    recording, runner = Recording(monkeypatch), ModelRunner(build_model("llama"), OfAccelerator())
    plain, replayed = (sample(runner, tokenizer, 80, stop=["77"], cuda_graphs=on) for on in (False, True))
    assert torch.equal(plain.sequences.completion_ids, replayed.sequences.completion_ids)
    assert torch.allclose(plain.sampling_logprobs, replayed.sampling_logprobs, atol=1e-5, rtol=0)
    stages = Counter(int((plain.sequences.completion_mask.sum(1) > token).sum()) for token in range(80))
    lasting = sum(tokens > segment_decoding._LASTING for tokens in stages.values())
    assert recording.notes == ["recorded"] * lasting and 1 < lasting < len(stages) / 4
    assert runner.graphs.passed and not recording.allocating


@pytest.mark.parametrize(
    ("how", "reason"),
    long_but(
        [
            ({"factor": 1.001}, "a replayed step differed"),
            ({"fails": ["end"]}, "RuntimeError: operation failed due to a previous error"),
            ({"fails": ["step", "end"]}, "RuntimeError: operation not permitted"),
            ({"fails": ["step"]}, "RuntimeError: operation not permitted"),
        ],
        *(0, 2),
    ),
)
def test_graphs_are_given_up_and_leave_nothing_behind(tokenizer, monkeypatch, caplog, how, reason):
    """`auto`, as on a GPU: plain steps give the same completions, one line is printed, and torch is as it was."""
    runner = ModelRunner(build_model("llama"), OfAccelerator())
    plain = sample(runner, tokenizer, 60, stop=["77"])
    assert not runner.graphs.why_not, "auto makes none on a CPU"
    recording = Recording(monkeypatch, **how)
    monkeypatch.setattr(sampling, "_replays", lambda device: True)
    found = [sample(runner, tokenizer, 60, stop=["77"]) for _ in range(2)]
    assert all(torch.equal(part.sequences.completion_ids, plain.sequences.completion_ids) for part in found)
    assert caplog.text.count("sampled without CUDA graphs") == 1 and reason in runner.graphs.why_not
    assert recording.streams == recording.allocating == [] and recording.notes.count("recorded") == 1
    assert ("released" in recording.notes) == ("end" in how.get("fails", ())), "where torch has not"
    with pytest.raises(ConfigError, match=f"sampler.cuda_graphs=true: {reason}"):
        sample(runner, tokenizer, cuda_graphs=True)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "kind", "why"),
    [
        ("llama", Backend, "a CPU"),
        ("mistral", OfAccelerator, "a sliding window"),
        ("dynamic", OfAccelerator, "this model's RoPE depends on the positions"),
    ],
)
def test_graphs_that_cannot_be_are_refused_or_it_is_said_once(tokenizer, monkeypatch, caplog, family, kind, why):
    model = build_model("llama", rope_parameters=DYNAMIC) if family == "dynamic" else build_adapted(family).model
    runner = ModelRunner(model, kind())
    runner.prepare()
    monkeypatch.setattr(ModelRunner, "passes", lambda self: {"attention by segments": ""} if why != "a CPU" else {})
    with pytest.raises(ConfigError, match=rf"sampler.cuda_graphs=true: {why}.*; set it to auto"):
        sample(runner, tokenizer, cuda_graphs=True)
    monkeypatch.setattr(sampling, "_replays", lambda device: True)
    for _ in range(2):
        sample(runner, tokenizer)
    assert caplog.text.count(f"for few rows: {why}") == 1 and not runner.graphs.passed

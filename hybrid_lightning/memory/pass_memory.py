"""Bytes that passes through the model hold at their peak: updating, scoring, and decoding.

Each pass is traced on a model of one layer and on one of two. Their difference is what each further layer adds.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hybrid_lightning.engine import Backend, SegmentDecoding, SharedPromptDecoding, begins_group, decoding_of, logprobs_of_hidden
from hybrid_lightning.memory.fake_model import FakeModel
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.rollout.batching import split_by_tokens
from hybrid_lightning.rollout.sampler import draw_by_integers, draw_tokens, filter_logits
from hybrid_lightning.types import Sequences


@dataclass(frozen=True)
class Traced:
    """Bytes that a pass holds at its peak."""

    activations: float
    logits: float
    backward: float = 0.0  # everything that the backward pass holds at its peak
    cache: float = 0.0  # keys and values
    packed: float = 0.0  # copies of weights in the order or dtype in which products read them

    def combine(self, other: "Traced", function: Callable[[float, float], float]) -> "Traced":
        """Apply a function to each field of both."""
        return Traced(*(function(getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self)))


def passes_of_step(settings: RunSettings, prompts: int) -> list[Sequences]:
    """Rows of each pass of one micro-batch, of `prompts` on each device, if all rows take part and have full length."""
    rows = _rollout(settings, prompts)
    return _split_into_passes(rows.rows(slice(0, max(1, len(rows) // settings.micro_batches))), settings)


def passes_of_scoring(settings: RunSettings, prompts: int) -> list[Sequences]:
    """Rows of each pass of scoring, which splits a rollout of `prompts` by the token budget alone."""
    return _split_into_passes(_rollout(settings, prompts), settings)


class Traces:
    """Traces the passes of a run, each kind of pass once."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self._known: dict[Hashable, Traced] = {}
        self._models: dict[tuple[int, float | None], FakeModel] = {}

    def update(self, rows: Sequences, share_full: float | None) -> Traced:
        """Trace a forward and backward pass.

        `share_full` is the share of the candidates' parameters that is trained fully, while the others have LoRA; None for the
        base model as it is scored.
        """
        sizes = (len(rows), int(begins_group(rows).sum()), rows.prompt_ids.shape[1], rows.completion_ids.shape[1])
        return self._by_share(("update", *sizes), share_full, lambda fake: _trace_update(fake, rows))

    def decoding(self, prompts: int, samples: int, share_full: float | None) -> Traced:
        """Trace the sampling of `samples` completions of full length for each of the prompts that a device completes together."""
        return self._by_share(("decoding", prompts, samples), share_full, lambda fake: _trace_decoding(fake, prompts, samples))

    def _by_share(self, name: tuple[str | int, ...], share_full: float | None, trace: Callable[[FakeModel], Traced]) -> Traced:
        """Interpolate between LoRA on all candidates and all of them trained fully."""
        if share_full is None or share_full in (0, 1):
            return self._by_layers((*name, share_full), share_full, trace)
        lora, full = (self._by_layers((*name, share), share, trace) for share in (0, 1))
        return lora.combine(full, lambda few, many: few + share_full * (many - few))

    def _by_layers(self, name: Hashable, share_full: float | None, trace: Callable[[FakeModel], Traced]) -> Traced:
        """Extrapolate from one and two layers to all of the model's."""
        if name not in self._known:
            layers = self.settings.layers
            one = trace(self._model(1, share_full))
            if layers > 1:
                two = trace(self._model(2, share_full))
                one = one.combine(two, lambda first, both: first + (layers - 1) * (both - first))
            self._known[name] = one
        return self._known[name]

    def _model(self, layers: int, share_full: float | None) -> FakeModel:
        """Each is made once, which takes as long as a trace."""
        if (layers, share_full) not in self._models:
            self._models[layers, share_full] = FakeModel(self.settings, layers, share_full)
        return self._models[layers, share_full]


def _trace_update(fake: FakeModel, rows: Sequences) -> Traced:
    packed = fake.engine.packed(rows)
    tokens = fake.fake(rows.completion_ids[rows.sampled_mask])
    fake.fake_layout(packed)
    with fake.computing() as live:
        with fake.autocast():
            hidden = fake.engine.hidden(packed.ids, packed.positions, packed)
            kept, before = live.bytes, live.peak
            live.restart_peak()
            bonus = fake.settings.entropy_gradient
            logprobs, entropy = logprobs_of_hidden(fake.engine, packed.predicting(hidden), tokens, 1.0, bonus)
            loss = logprobs.mean() + entropy.mean() if bonus else logprobs.mean()
            del entropy
            del hidden
        with_logits = live.peak
        live.restart_peak()
        loss.backward()
    logits = with_logits - kept
    return Traced(activations=max(before, with_logits) - logits, logits=logits, backward=live.peak)


def _trace_decoding(fake: FakeModel, prompts: int, samples: int) -> Traced:
    settings = fake.settings
    rows = _sequences(prompts, 1, settings.prompt_tokens, 1)
    decoding = decoding_of(fake.engine, rows.prompt_ids, rows.prompt_mask, settings.completion_tokens)
    assert isinstance(decoding, SharedPromptDecoding | SegmentDecoding), "the model is taken to be packed"
    fake.fake_layout(decoding.layout)
    decoding.lengths = fake.fake(decoding.lengths)
    dtype = torch.bfloat16 if settings.mixed_precision else None
    with fake.computing() as live, torch.no_grad(), fake.autocast(), fake.engine.sampling(dtype):
        decoding.prepack_projection()
        packed = live.bytes
        live.restart_peak()
        logits = decoding.prefill(samples)
        reading = live.peak
        if settings.completion_tokens > 1:
            del logits
            if isinstance(decoding, SharedPromptDecoding):  # the other's cache has its full length from the start
                _fill_cache(decoding, prompts * samples)
            live.restart_peak()
            logits = decoding.step(decoding.lengths.new_zeros(prompts * samples))
        cache = sum(part.nbytes for layers in (decoding.prompt, decoding.own) for pair in layers.values() for part in pair)
        forward, before = live.peak, live.bytes - logits.nbytes
        live.restart_peak()
        _draw(logits, fake.engine.backend)
        of_logits = live.peak - before
        peak = max(reading, forward, live.peak) - packed
        del logits
    return Traced(activations=max(0.0, peak - cache - of_logits), logits=of_logits, cache=cache, packed=packed)


def _draw(logits: Tensor, backend: Backend) -> None:
    """Sample from logits as the sampler does at its defaults."""
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)
    if backend.usable(logits):
        backend.draw_tokens(logits, uniform, 1.0)
    elif not backend.is_cpu(logits.device):
        draw_by_integers(logits, uniform, 1.0)
    else:
        scaled = logits.float()
        token = draw_tokens(filter_logits(scaled, 0, 1.0), uniform)
        scaled.log_softmax(dim=-1).gather(1, token[:, None])


def _fill_cache(decoding: SharedPromptDecoding, rows: int) -> None:
    """Grow the cache to its full length, so that the next step is that of the last token."""
    decoding.step(decoding.lengths.new_zeros(rows))  # allocates room for the first tokens
    made = {layer: [(*part.shape[:3], part.shape[4], part.dtype) for part in pair] for layer, pair in decoding.own.items()}
    decoding.own.clear()
    for layer, pair in made.items():
        keys, values = (decoding.lengths.new_empty(*size[:3], decoding.max_new_tokens, size[3], dtype=size[4]) for size in pair)
        decoding.own[layer] = (keys, values)
    decoding.decoded = decoding.max_new_tokens - 2


def _split_into_passes(rows: Sequences, settings: RunSettings) -> list[Sequences]:
    return [rows.rows(run) for run in split_by_tokens(rows, settings.tokens_of_pass())]


def _rollout(settings: RunSettings, prompts: int) -> Sequences:
    return _sequences(prompts, settings.samples_per_prompt, settings.prompt_tokens, settings.completion_tokens)


def _sequences(prompts: int, samples: int, prompt_tokens: int, completion_tokens: int) -> Sequences:
    """Rows of these sizes, in which each prompt has different tokens."""
    number = torch.arange(prompts).repeat_interleave(samples)[:, None]
    prompt_ids = number.expand(-1, prompt_tokens)
    completion_ids = torch.zeros(len(number), completion_tokens, dtype=torch.long)
    prompt_mask, completion_mask = (torch.ones_like(ids, dtype=torch.bool) for ids in (prompt_ids, completion_ids))
    return Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask)

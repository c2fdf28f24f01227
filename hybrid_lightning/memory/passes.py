"""What passes through the model hold while they run: updates, scoring, and decoding.

Each is traced with one layer and with two; what one layer more adds is what each of the others adds.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hybrid_lightning.memory.fake_model import FakeModel
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.policy.logprobs import logprobs_of_hidden
from hybrid_lightning.rollout.drawing import draw, filter_logits
from hybrid_lightning.rollout.forward import packed_hidden
from hybrid_lightning.rollout.micro_batches import split_by_tokens
from hybrid_lightning.rollout.packing import PackedSequences
from hybrid_lightning.rollout.shared_decoding import SharedPromptDecoding
from hybrid_lightning.types import Sequences


@dataclass(frozen=True)
class Traced:
    """Bytes at the moment when a pass holds most."""

    activations: float
    logits: float
    cache: float = 0.0  # keys and values

    def combine(self, other: "Traced", function: Callable[[float, float], float]) -> "Traced":
        """Field by field."""
        return Traced(*(function(getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self)))


def passes_of_step(settings: RunSettings, prompts: int) -> list[Sequences]:
    """The rows of each forward and backward pass of one micro-batch, if all take part and have full length.

    Args:
        settings: Of the run.
        prompts: Of one device in a rollout.
    """
    rows = _sequences(prompts, settings.samples_per_prompt, settings.prompt_tokens, settings.completion_tokens)
    first = rows.rows(slice(0, max(1, len(rows) // settings.micro_batches)))
    return [first.rows(run) for run in split_by_tokens(first, settings.tokens_of_pass)]


def trace_update(settings: RunSettings, rows: Sequences, share_full: float | None) -> Traced:
    """Forward and backward pass over rows.

    Args:
        settings: Of the run.
        rows: Of the pass.
        share_full: Of the candidates' numbers, how many are trained fully; the others by LoRA. None: as in scoring.
    """
    if share_full is None or share_full in (0, 1):
        return _over_layers(settings, lambda layers: _update(FakeModel(settings, layers, share_full), rows))
    lora, full = (trace_update(settings, rows, share) for share in (0.0, 1.0))
    return lora.combine(full, lambda few, many: few + share_full * (many - few))


def trace_decoding(settings: RunSettings, prompts: int, samples: int, adapted: bool = True) -> Traced:
    """Sampling completions of full length.

    Args:
        settings: Of the run.
        prompts: Completed together on one device.
        samples: Completions of each.
        adapted: Or the base model as it is.
    """
    share = 0.0 if adapted else None
    return _over_layers(settings, lambda layers: _decoding(FakeModel(settings, layers, share), prompts, samples))


def _over_layers(settings: RunSettings, trace: Callable[[int], Traced]) -> Traced:
    one = trace(1)
    if settings.layers == 1:
        return one
    return one.combine(trace(2), lambda first, both: first + (settings.layers - 1) * (both - first))


def _update(fake: FakeModel, rows: Sequences) -> Traced:
    packed = PackedSequences(rows)
    predictors, tokens = fake.fake(packed.predictors()), fake.fake(rows.completion_ids[rows.completion_mask])
    fake.fake_layout(packed)
    with fake.computing() as live:
        with fake.autocast():
            hidden = packed_hidden(fake.model, packed.ids, packed.positions, packed)
            kept, before = live.bytes, live.peak
            live.restart_peak()
            logprobs, _ = logprobs_of_hidden(fake.model, hidden[predictors], tokens, 1.0)
            loss = logprobs.mean()
            del hidden
        with_logits = live.peak
        live.restart_peak()
        loss.backward()  # type: ignore[no-untyped-call]
        peak = max(before, with_logits, live.peak)
    logits = with_logits - kept
    return Traced(activations=peak - logits, logits=logits)


def _decoding(fake: FakeModel, prompts: int, samples: int) -> Traced:
    settings = fake.settings
    rows = _sequences(prompts, 1, settings.prompt_tokens, 1)
    decoding = SharedPromptDecoding(fake.model, rows.prompt_ids, rows.prompt_mask, settings.completion_tokens)
    fake.fake_layout(decoding.layout)
    decoding.lengths = fake.fake(decoding.lengths)
    with fake.computing() as live, torch.no_grad(), fake.autocast():
        logits = decoding.prefill(samples)
        reading = live.peak
        if settings.completion_tokens > 1:
            del logits
            _fill_cache(decoding, prompts * samples)
            live.restart_peak()
            logits = decoding.step(decoding.lengths.new_zeros(prompts * samples))
        cache = sum(part.nbytes for part in _cache(decoding))
        forward, before = live.peak, live.bytes - logits.nbytes
        live.restart_peak()
        scaled = logits.float()
        token = draw(filter_logits(scaled, 0, 1.0), None)
        scaled.log_softmax(dim=-1).gather(1, token[:, None])
        of_logits = live.peak - before
        peak = max(reading, forward, live.peak)
        del logits, scaled, token
    return Traced(activations=max(0.0, peak - cache - of_logits), logits=of_logits, cache=cache)


def _fill_cache(decoding: SharedPromptDecoding, rows: int) -> None:
    """Let the next step be that of the last token."""
    decoding.step(decoding.lengths.new_zeros(rows))  # which allocates room for the first tokens
    made = {layer: [(*part.shape[:3], part.shape[4], part.dtype) for part in pair] for layer, pair in decoding.own.items()}
    decoding.own.clear()
    for layer, pair in made.items():
        keys, values = (
            decoding.lengths.new_empty(*sizes[:3], decoding.max_new_tokens, sizes[3], dtype=sizes[4]) for sizes in pair
        )
        decoding.own[layer] = (keys, values)
    decoding.decoded = decoding.max_new_tokens - 2


def _cache(decoding: SharedPromptDecoding) -> list[Tensor]:
    return [part for layers in (decoding.prompt, decoding.own) for pair in layers.values() for part in pair]


def _sequences(prompts: int, samples: int, prompt_tokens: int, completion_tokens: int) -> Sequences:
    """Rows of these sizes, in which different prompts differ."""
    number = torch.arange(prompts).repeat_interleave(samples)[:, None]
    prompt_ids = number.expand(-1, prompt_tokens)
    completion_ids = torch.zeros(len(number), completion_tokens, dtype=torch.long)
    masks = (torch.ones_like(ids, dtype=torch.bool) for ids in (prompt_ids, completion_ids))
    prompt_mask, completion_mask = masks
    return Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask)

"""Counts of sampling, update and scoring at full size on a fake GPU, as JSON: `python counts.py FILE`."""

import json
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import fake_gpu

sys.path.append(str(Path(__file__).parents[1]))

with tempfile.TemporaryDirectory() as folder:
    fake_gpu.load(Path(folder))

import real_run
import torch
from fake_model import FakeModel
from tiny_models import build_tokenizer
from transformers.generation.stopping_criteria import StopStringCriteria

from benchmarks.memory import plan_qwen3
from hybrid_lightning.adapters import ExactGradients, LoraSettings, Scoring, SketchedGradients, TailEnergy, find_candidates
from hybrid_lightning.engine import Backend, decoding_of, logprobs_of_hidden
from hybrid_lightning.engine.decoder_layers import _Body
from hybrid_lightning.engine.packing import PackedSequences
from hybrid_lightning.engine.passes import prepacked_projection
from hybrid_lightning.rollout import Sampler, sampler
from hybrid_lightning.rollout.interface import Stops
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt, Sequences

Counter = fake_gpu.counter()
PROMPTS, SAMPLES, PROMPT, COMPLETION = 32, 8, 384, 256
TOKENS = 8  # that are looked at
CONFIG = plan_qwen3.config("Qwen3-0.6B")


def sequences(prompts, samples, prompt_tokens, completion_tokens):
    """Rows of these sizes, in which each prompt has different tokens."""
    prompt_ids = torch.arange(prompts).repeat_interleave(samples)[:, None].expand(-1, prompt_tokens)
    completion_ids = torch.zeros(prompts * samples, completion_tokens, dtype=torch.long)
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompt_ids, completion_ids)]
    return Sequences(prompt_ids, masks[0], completion_ids, masks[1])


@contextmanager
def counting(fake):
    with fake.computing(), Counter() as counter:
        yield counter.counts


@cache
def fake_model(layers, share):
    """A share of 0 is LoRA, None the model as it is scored."""
    return FakeModel(CONFIG, layers, share, LoraSettings(rank=16, alpha=32), "cuda:0")


def of_all_layers(count, share=0):
    """Counts of one and two layers, and by these of all."""
    one, two = (count(fake_model(layers, share)) for layers in (1, 2))
    more = CONFIG.num_hidden_layers - 1
    return {
        "kernels": one.kernels + more * (two.kernels - one.kernels),
        "kernels of a layer": two.kernels - one.kernels,
        "bytes": one.bytes + more * (two.bytes - one.bytes),
        "syncs": sorted(set(two.syncs)),
        "atomics": sorted(set(two.atomics)),
    }


def sampling(fake, seen):
    """Tokens of all completions by the sampler's own loop and by compiled layers; gives to `seen` what there was before each."""
    rows = sequences(PROMPTS, 1, PROMPT, 1)
    fake.engine._fast.compiles = True
    made = decoding_of(fake.engine, rows.prompt_ids, rows.prompt_mask, COMPLETION)
    fake.fake_layout(made.layout)
    made.lengths = fake.fake(made.lengths)
    ids, mask = fake.fake(rows.prompt_ids), fake.fake(rows.prompt_mask)
    prompts = [Prompt(text="", index=index) for index in range(PROMPTS)]
    draws = PromptDraws(prompts, SAMPLES, 0)
    with (
        mock.patch.multiple(sampler, decoding_of=lambda *_: made, _EVERY=TOKENS - 2),
        mock.patch.object(torch, "Event", mock.Mock()),
        mock.patch.object(torch.Tensor, "pin_memory", lambda part: part),
        torch.no_grad(),
        fake.engine.sampling(torch.bfloat16),
        fake.computing(),
    ):
        made.project = prepacked_projection(fake.model, fake.engine.backend)
        plain = Sampler(COMPLETION, cuda_graphs=False)
        with Counter() as counter:

            def look(alive, token):
                seen.append(replace(counter.counts, syncs=[*counter.counts.syncs], atomics=[*counter.counts.atomics]))
                if token == TOKENS:
                    raise real_run.EnoughError

            call = _Body.__call__
            body = mock.patch.object(_Body, "__call__", lambda *given: counter.compiled(lambda: call(*given)))
            loop = sampler._Decoder(plain, fake.engine, build_tokenizer(), Stops((2,), None), False, look)
            with suppress(real_run.EnoughError), body:
                loop.decode(lambda: loop.prefill(ids, mask, SAMPLES, COMPLETION), draws, [COMPLETION] * PROMPTS * SAMPLES)


def decoding(fake):
    """One of the tokens after the first, and what all of them wait for."""
    seen = []
    sampling(fake, seen)
    first, second, last = seen[1], seen[2], seen[-1]
    counts = replace(second, kernels=second.kernels - first.kernels, bytes=second.bytes - first.bytes)
    counts.syncs, counts.atomics = last.syncs[len(seen[0].syncs) :], last.atomics[len(seen[0].atomics) :]
    return counts


def ideal_decoding(rank):
    """Bytes of all weights once, but the embeddings of other tokens, and of all keys and values once."""
    size, heads, groups = CONFIG.head_dim, CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = [(hidden, size * heads), (hidden, size * groups), (hidden, size * groups), (size * heads, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = sum(m * n for m, n in shapes) * 2 + sum(rank * (m + n) for m, n in shapes) * 4
    tokens = PROMPTS * PROMPT + PROMPTS * SAMPLES * COMPLETION
    return CONFIG.num_hidden_layers * (weights + tokens * groups * size * 2 * 2) + CONFIG.vocab_size * hidden * 2


def losses_of(fake):
    """A function that gives the loss of four prompts with all of their completions."""
    rows = sequences(4, SAMPLES, PROMPT, COMPLETION)
    packed = fake.engine.packed(rows)
    tokens = fake.fake(rows.completion_ids[rows.sampled_mask])
    fake.fake_layout(packed)

    def losses():
        hidden = fake.engine.hidden(packed.ids, packed.positions, packed)
        yield logprobs_of_hidden(fake.engine, packed.predicting(hidden), tokens, 1.0)[0].mean()

    return losses


def update(fake):
    """Forward and backward pass."""
    losses = losses_of(fake)
    with counting(fake) as counts:
        next(losses()).backward()
    return counts


class Unchecked(Scoring):
    """Does not look at the loss, which the host waits for once a loss."""

    def check_loss(self, loss, index):
        pass


def scoring(fake, mode):
    """Forward and backward pass, and what is kept of the gradients."""
    losses, candidates = losses_of(fake), find_candidates(fake.model)
    fake.model.requires_grad_(False)  # or gradients are dropped before they are taken
    with counting(fake) as counts:
        Unchecked(fake.model, candidates, losses(), TailEnergy(), 16, mode).collect_gradients(lambda seen: None)
    counts.syncs = [f"{len(counts.syncs) / len(candidates):g} {name}" for name in set(counts.syncs)]
    return counts


def layout_syncs(window):
    """What the layout of an update asks the device for, with a window that hides keys of prompts or without, on real tensors."""
    lists, tolist = [], torch.Tensor.tolist
    with Counter() as counter, mock.patch.object(torch.Tensor, "tolist", lambda part: lists.append("tolist") or tolist(part)):
        packed = PackedSequences(sequences(4, SAMPLES, 12, 9), Backend(), segments=True)
        _ = packed.gathered if window else packed.layout
    return counter.counts.syncs + lists


def stop_string_syncs():
    """What looking for stop strings asks the device for after a token, counted on real tensors."""
    criteria = StopStringCriteria(build_tokenizer(), ["37", "1+2"])
    with Counter() as counter:
        criteria(torch.randint(3, 12, (8, 9)), None)
    return counter.counts.syncs


def planted():
    """The kinds of mistakes that are found where there are some."""
    fake, places = fake_model(1, 0), torch.zeros(8, dtype=torch.long)

    def caught(what):
        numbers = fake.fake(torch.zeros(8, 4))
        try:
            with counting(fake) as counts:
                what(numbers)
        except Exception as error:
            return type(error).__name__
        return ", ".join([*counts.syncs, *counts.atomics])

    return {
        "item": caught(lambda x: x.sum().item()),
        "tolist": caught(lambda x: x.tolist()),
        "if": caught(lambda x: bool((x > 0).any())),
        "boolean index": caught(lambda x: x[x > 0]),
        "to host": caught(lambda x: x.cpu()),
        "from host": caught(lambda x: x + torch.tensor([1.0], device="cuda")),
        "index_add": caught(lambda x: x.index_add(0, torch.zeros(8, dtype=torch.long, device="cuda"), x)),
        "accumulate": caught(lambda x: x.index_put((torch.zeros(8, dtype=torch.long, device="cuda"),), x, accumulate=True)),
        "stray": caught(lambda x: x + places),
        "nothing": caught(lambda x: (x + 1).cumsum(1)),
    }


def main():
    warnings.simplefilter("ignore")
    found = {
        "planted": planted(),
        "syncs of a layout": layout_syncs(window=False),
        "syncs of a layout with a window": layout_syncs(window=True),
        "syncs of stop strings": stop_string_syncs(),
        "decoding": of_all_layers(decoding),
        "decoding of FFT": of_all_layers(decoding, share=1),
        "ideal": {"decoding": ideal_decoding(16), "decoding of FFT": ideal_decoding(0)},
        "update": of_all_layers(update),
        "scoring": of_all_layers(lambda fake: scoring(fake, ExactGradients()), None),
        "sketches": of_all_layers(lambda fake: scoring(fake, SketchedGradients()), None),
        **real_run.main(),
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""What the fake GPU computes, with numbers, beside what transformers computes on a CPU: `python values.py FILE`.

A small model samples and trains on all paths of a GPU: compiled layers, attention by segments, CUDA graphs, rows that leave late,
several passes a step. One of its modules is trained fully, two are frozen, and the others have LoRA. Each token is drawn again
here from a plain pass over everything before it, and gradients are those of plain passes over whole rows.
"""

import json
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from unittest import mock

import fake_gpu

with tempfile.TemporaryDirectory() as folder:
    fake_gpu.load(Path(folder))

import torch
from fake_model import FakeBackend, FakeModel, without_compiler
from fake_run import fit, policy_of
from known import real
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from tiny_decoders import SOME
from tiny_models import build_model, build_tokenizer
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import MessageRequest, SamplingRequest, Stops
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.runner import use_fused_modules
from hybrid_lightning.types import LossInputs, PolicyBatch, Prompt, Sequences

TEXTS, SAMPLES, CAPACITY, STOPS = ("12+3=", "what is 7 plus 15?\n", "9="), 5, 70, (2, 7)
torch.set_num_threads(1)  # beside other processes
PROMPTS, TOKENIZER = [Prompt(text=text, index=place) for place, text in enumerate(TEXTS)], build_tokenizer()
IDS = [TOKENIZER(text).input_ids for text in TEXTS]
LIMITS = [48 - 2 * row for row in range(len(TEXTS) * SAMPLES)]
AGAIN, ADDED = [0, 3, 4, 9, 13], [[5, 6, 7], [8], [], [9, 10, 11, 12], [13, 14]]  # rows of the second turn, and what is added


def build():
    """The model, and the same on the fake GPU."""
    adapter = LoraConfig(
        r=3, target_modules=list(SOME), init_lora_weights=False, modules_to_save=["model.layers.0.self_attn.v_proj"]
    )
    model, backend = get_peft_model(build_model("qwen3"), adapter).eval(), FakeBackend()
    fused = deepcopy(model)
    use_fused_modules(fused, backend)
    fake = FakeModel(fused, backend)
    fake.plan = plan_of_budget(
        find_candidates(build_model("qwen3")), ModuleBudget(0.1), LoraSettings(rank=3, alpha=8)
    )  # of its kind
    return model.double(), fake


def padded(rows):
    """Rows with padding on the left: ids, mask and positions."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def drawn(model, contexts, draws, limits, temperature=1.0, filters=()):
    """Tokens and log-probabilities of each row."""
    tokens, logprobs = [[] for _ in contexts], [[] for _ in contexts]
    for step in range(max(limits)):
        running = [row for row, own in enumerate(tokens) if len(own) == step < limits[row] and not set(own) & set(STOPS)]
        if not running:
            break
        logits = model(**padded([contexts[row] + tokens[row] for row in running])).logits[:, -1] / temperature
        sums = LogitsProcessorList(filters)(None, logits).softmax(-1).cumsum(-1)
        found = (sums <= draws.numbers(torch.tensor(running), step) * sums[:, -1:]).sum(-1)
        for row, token, logprob in zip(running, found.tolist(), logits.log_softmax(-1), strict=True):
            tokens[row].append(token)
            logprobs[row].append(float(logprob[token]))
    return tokens, logprobs


def rows_of(rollout):
    """Tokens and log-probabilities of each completion, and whether it has ended by a stop token."""
    lengths = real(rollout.sequences.completion_mask).sum(1).tolist()
    numbers = real(rollout.sequences.completion_ids).tolist(), real(rollout.sampling_logprobs).tolist()
    ended = [completion.finished for completion in rollout.completions]
    return [(ids[:n], logprobs[:n], end) for ids, logprobs, n, end in zip(*numbers, lengths, ended, strict=True)]


def differences(found, tokens, logprobs):
    """How many rows differ, and by how much log-probabilities do."""
    expected = [(row, bool(set(row) & set(STOPS))) for row in tokens]
    others = sum((ids, ended) != other for (ids, _, ended), other in zip(found, expected, strict=True))
    pairs = [pair for (_, own, _), other in zip(found, logprobs, strict=True) for pair in zip(own, other, strict=False)]
    return {"rows": others, "logprobs": max(abs(one - other) for one, other in pairs)}


def sampled(model, fake):
    """Episodes of two messages with all tokens, and completions of some tokens."""
    request = SamplingRequest(PROMPTS, (), SAMPLES, PromptDraws(PROMPTS, SAMPLES, 3), stops=Stops(STOPS, None))
    half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    contexts = [list(ids) for ids in IDS for _ in range(SAMPLES)]
    with without_compiler(), fake.counted() as counted, half, fake.runner.sampling(torch.bfloat16):
        session = Sampler(CAPACITY, temperature=0.8).session(fake.runner, TOKENIZER, request, CAPACITY)
        asked = zip(contexts, LIMITS, strict=True)
        first = session.sample([MessageRequest(row, 0, *each) for row, each in enumerate(asked)])
        own = [first[row].ids + added for row, added in zip(AGAIN, ADDED, strict=True)]
        later = [contexts[row] + more for row, more in zip(AGAIN, own, strict=True)]
        limits = [CAPACITY - len(more) for more in own]
        counted.known.too_long = 0
        second = session.sample([MessageRequest(row, 1, *each) for row, *each in zip(AGAIN, later, limits, strict=True)])
        replayed, too_long = counted.known.replayed, counted.known.too_long
        request = SamplingRequest(PROMPTS, IDS, SAMPLES, PromptDraws(PROMPTS, SAMPLES, 4), stops=Stops(STOPS, None))
        sampler = Sampler(40, temperature=0.7, top_k=25, top_p=0.9, min_p=0.02)
        some = sampler.sample(fake.runner, TOKENIZER, request)
    first, second = ([(each.ids, each.logprobs, each.completion.finished) for each in turn] for turn in (first, second))
    draws = PromptDraws(PROMPTS, SAMPLES, 3)
    with torch.no_grad():
        tokens, logprobs = drawn(model, contexts, draws, LIMITS, 0.8)
        found = {"first": differences(first, tokens, logprobs), "replayed": replayed, "too long": too_long}
        found["second"] = differences(second, *drawn(model, later, draws.of_turns(AGAIN, [1] * len(AGAIN)), limits, 0.8))
        filters = TopKLogitsWarper(25), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)
        draws = PromptDraws(PROMPTS, SAMPLES, 4)
        found["some"] = differences(rows_of(some), *drawn(model, contexts, draws, [40] * len(contexts), 0.7, filters))
    return found, tokens


class Gradients(Callback):
    """Of the step, before they are clipped."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        with _disable_current_modes():
            self.found = {name: real(part.grad).clone() for name, part in module.model.named_parameters() if part.requires_grad}
        self.loss = float(trainer.callback_metrics["loss"])


def trained(model, fake, tokens):
    """The largest difference of a gradient, relative to its size; of the loss, and of the log-probabilities before the step."""
    rows, width = len(tokens), max(map(len, tokens))
    contexts = [list(ids) for ids in IDS for _ in range(SAMPLES)]
    whole, ids = padded(contexts), torch.tensor([row + [0] * (width - len(row)) for row in tokens])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in tokens])
    advantages, gradients = torch.randn(rows, generator=torch.Generator().manual_seed(5)), Gradients()
    sums = float(rows), float(mask.sum())
    counted, parts = fake.counted(), (whole["input_ids"], whole["attention_mask"], ids, mask, torch.zeros_like(ids))
    of_sampler = torch.zeros(ids.shape)
    put, module = counted.known.put, policy_of(fake, 150)
    with without_compiler(), counted:
        batch = PolicyBatch(Sequences(*map(put, parts)), put(advantages), put(of_sampler), None, None, *sums, *sums)
        passes = len(module.task.passes.chunks(batch.sequences))
        with mock.patch.object(Passes, "logprobs", autospec=True, side_effect=Passes.logprobs) as calls:
            (batch,) = module.task.add_logprobs([batch], False)
        rows_of_passes = [len(call.args[1]) for call in calls.call_args_list]
        alike = rows_of_passes == 2 * [part.stop - part.start for part in module.task.passes.chunks(batch.sequences)]
        fit(module, fake, batch, 1, gradients)

    def logprobs():
        inputs = padded([context + own for context, own in zip(contexts, tokens, strict=True)])
        logits, found = model(**inputs).logits.log_softmax(-1), torch.zeros(ids.shape, dtype=torch.float64)
        for row, own in enumerate(tokens):
            predicting = logits[row, -len(own) - 1 : -1]
            found[row, : len(own)] = predicting.gather(1, torch.tensor(own)[:, None]).squeeze(1)
        return found

    policy = logprobs()
    with torch.no_grad(), model.disable_adapter():
        start = logprobs()
    given = {"num_sequences": sums[0], "num_tokens": sums[1]}
    inputs = LossInputs(policy, advantages.double(), mask, policy.detach(), start, **given)
    loss = GSPOLoss(kl_coef=0.01)(inputs).loss
    loss.backward()
    expected = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    assert expected.keys() == gradients.found.keys()
    of_gradients = max(float((part - gradients.found[name]).norm() / part.norm()) for name, part in expected.items())
    before = [(real(batch.old_logprobs), policy), (real(batch.ref_logprobs), start)]
    of_logprobs = max(float((one - other).abs().max()) for one, other in before)
    of_loss = abs(gradients.loss - float(loss))
    return {"gradients": of_gradients, "loss": of_loss, "logprobs": of_logprobs, "passes": passes, "alike": alike}


def main():
    warnings.simplefilter("ignore")
    model, fake = build()
    found, tokens = sampled(model, fake)
    Path(sys.argv[1]).write_text(json.dumps({**found, "trained": trained(model, fake, tokens)}))


if __name__ == "__main__":
    main()

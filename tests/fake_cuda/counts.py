"""Counts of a policy's steps, of its scoring and of a rollout on a fake GPU, by the objects of a run: `python counts.py FILE`.

The file is JSON. The model has the sizes of Qwen3-0.6B and two layers.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import fake_gpu

sys.path.append(str(Path(__file__).parents[1]))

with tempfile.TemporaryDirectory() as folder:
    fake_gpu.load(Path(folder))

import torch
from fake_model import FakeModel
from known import Known, Peaks
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_models import build_tokenizer
from tiny_runs import Constant
from transformers import Qwen3Config

from benchmarks.memory import plan_qwen3
from hybrid_lightning.adapters import (
    ExactGradients,
    LoraSettings,
    ModuleBudget,
    Scoring,
    SketchedGradients,
    TailEnergy,
    find_candidates,
)
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.engine import Backend, SegmentDecoding, token_logprobs
from hybrid_lightning.engine.decoder_layers import _Body
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.memory import RunSettings, TrainerFlags, peaks
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training.calibration import training_losses
from hybrid_lightning.training.step import OptimizerStep
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

PROMPTS, SAMPLES, PROMPT, COMPLETION, LAYERS = 4, 8, 384, 256, 2
ONE_LONG = (1, 1, 384, 16_000)
CONFIG = Qwen3Config(**{**plan_qwen3.config("Qwen3-0.6B").to_dict(), "num_hidden_layers": LAYERS, "layer_types": None})
LORA = {"rank": 16, "alpha": 32}


def plan(share, prompts=PROMPTS, samples=SAMPLES, prompt=PROMPT, completion=COMPLETION):
    """The plan of such a run: its peaks, and the bytes at the end of a forward pass and in a backward pass."""
    planning, flags = HybridAdapterSetup(ModuleBudget(share), **LORA).planning, TrainerFlags(on_cpu=False, precision="bf16-mixed")
    sizes = {"prompt_tokens": prompt, "completion_tokens": completion, "max_tokens_per_micro_batch": 10**6}
    settings = RunSettings(CONFIG, schedule=RolloutSchedule(prompts, samples), planning=planning, flags=flags, **sizes)
    largest = peaks._largest
    with mock.patch.object(peaks, "_largest", side_effect=largest) as passes:
        found = plan_method(dataclasses.replace(settings, dtype=torch.bfloat16)).peaks
    (_, forward, backward), of_pass = passes.call_args.args
    return found, forward.total + of_pass.activations + of_pass.logits, backward.total + of_pass.backward


class Device(SingleDeviceStrategy):
    """One on which the model lies already, and stays."""

    def __init__(self, device):
        super().__init__(device, accelerator=type("Any", (CPUAccelerator,), {"setup_device": lambda self, device: None})())

    def model_to_device(self):
        pass

    def teardown(self):
        pass


class SecondStep(Callback):
    """What the second step waits for, and the peaks, kernels and bytes of its two passes."""

    def __init__(self, known, live):
        self.known, self.live = known, live

    def on_train_batch_start(self, *_):
        self.known.places.clear()
        self.live.restart_peak()
        self.begin = dataclasses.replace(self.known.counts)

    def on_before_backward(self, *_):
        self.forward = self.live.peak
        self.live.restart_peak()

    def on_after_backward(self, *_):
        self.backward = self.live.peak
        self.work = work(self.begin, self.known.counts)

    def on_train_batch_end(self, *_):
        self.waits = dict(self.known.places)


class Counted:
    """Counts within its context, as `known` and `live`."""

    def __init__(self, fake):
        self.known, self.live, self._stack, self._fake = Known(fake), Peaks(), ExitStack(), fake

    def __enter__(self):
        self.live.count(self._fake.model.parameters())
        for context in (mock.patch.multiple("torch._subclasses.fake_tensor.FakeTensor", **self.known.patches), self._fake.mode):
            self._stack.enter_context(context)
        for mode in (self.live, self.known):
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


def rows_of(known, prompts, samples, prompt, completion):
    """Rows of full length. Each prompt has different tokens."""
    prompt_ids = torch.arange(prompts).repeat_interleave(samples)[:, None].expand(-1, prompt)
    ids = torch.zeros(prompts * samples, completion, dtype=torch.long)
    masks = [torch.ones_like(part, dtype=torch.bool) for part in (prompt_ids, ids)]
    return Sequences(*map(known.put, (prompt_ids, masks[0], ids, masks[1], ids)))


def adapted(share):
    return FakeModel(CONFIG, LAYERS, share, LoraSettings(**LORA), "cuda:0")


def work(begin, end):
    """The kernels in between, and the bytes that they move."""
    return {"kernels": end.kernels - begin.kernels, "bytes": end.bytes - begin.bytes}


def found(known, **more):
    return {"copies": known.copies, "atomics": known.counts.atomics, **more}


def steps(share, sizes=(PROMPTS, SAMPLES, PROMPT, COMPLETION)):
    """Two optimizer steps of GSPO with a KL term and clipping, after the passes that it needs beforehand."""
    fake = adapted(share)
    module = PolicyModule(GSPOLoss(kl_coef=0.01), Constant(), dtype="bfloat16", max_tokens_per_micro_batch=10**6)
    policy, counted = module.policy, Counted(fake)
    policy._model, policy._engine, policy._base_digest, policy.plan = fake.model, fake.engine, "fake", fake.plan
    policy._on_model(fake.model)
    known, sequences = counted.known, rows_of(counted.known, *sizes)
    rows = len(sequences)
    numbers = [fake.fake(torch.zeros(size)) for size in ((rows,), sequences.completion_ids.shape)]
    batch = PolicyBatch(sequences, *numbers, None, None, *2 * (float(rows), float(rows * sizes[-1])))
    second, batches = SecondStep(known, counted.live), []
    loader = type("Loader", (), {"__iter__": lambda self: iter(2 * batches), "__len__": lambda self: 2})()
    with tempfile.TemporaryDirectory() as folder, counted:
        batches += module.task.add_logprobs([batch], False)
        before = dict(known.places)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        flags = {"precision": "bf16-mixed", "max_steps": 2, "gradient_clip_val": 1.0, "default_root_dir": folder, **quiet}
        Trainer(strategy=Device(fake.device), callbacks=[second], **flags).fit(module, train_dataloaders=loader)
    _, forward, backward = plan(share, *sizes)
    of_plan = {"forward": second.forward / forward, "backward": second.backward / backward}
    return found(known, before=before, waits=second.waits, logits=known.logits, **second.work, **of_plan)


def planted():
    """Steps into which mistakes are put that the counts have to show."""
    log = OptimizerStep._log

    def mistaken(step, batch, shares):
        if float(shares["loss"]):
            weight = step._passes.policy.model.get_input_embeddings().weight.clone()
            weight.detach().index_add_(0, torch.zeros(1, dtype=torch.long, device=weight.device), weight[:1].detach())
        log(step, batch, shares)

    with mock.patch.object(OptimizerStep, "_log", mistaken), mock.patch.object(Backend, "most_logits", lambda *_: 10**12):
        return steps(0)


def scoring(mode):
    """The gradients of calibration rollouts, as modules are scored by them."""
    fake = adapted(None)
    counted, candidates = Counted(fake), find_candidates(fake.model)
    sequences = rows_of(counted.known, PROMPTS, SAMPLES, PROMPT, COMPLETION)
    advantages = counted.known.put(torch.ones(len(sequences)))
    fake.model.requires_grad_(False)
    with counted, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        chunks = [(sequences, advantages)]
        losses = training_losses("reward", sequences, chunks, GSPOLoss(), lambda rows: token_logprobs(fake.engine, rows, 1.0))
        counted.known.places.clear()
        begin = dataclasses.replace(counted.known.counts)
        Scoring(fake.model, candidates, losses, TailEnergy(), 16, mode).collect_gradients(lambda seen: None)
    done = work(begin, counted.known.counts)
    return found(counted.known, waits=counted.known.places, modules=len(candidates), **done)


class EnoughError(Exception):
    """As many tokens were sampled as are looked at."""


def rollout(share, tokens=12):
    """A rollout from its prompts' texts on, by the sampler, until so many tokens."""
    fake = adapted(share)
    counted, seen, layers = Counted(fake), [], []
    fake.engine._fast.compiles = True
    call, attend = _Body.__call__, SegmentDecoding.attend_to_kept

    def body(*given):
        """Between two products of a step it is one kernel. Of the prompts' pass, which is large, only the memory counts."""
        return counted.known.compiled(lambda: call(*given)) if layers else call(*given)

    def attending(decoding, number, *given):
        layers.append(dataclasses.replace(counted.known.counts))
        return attend(decoding, number, *given)

    prompts = [Prompt(text="", index=index) for index in range(PROMPTS)]

    def look(alive, token):
        seen.append(dict(counted.known.places))
        if token == tokens:
            raise EnoughError

    draws = PromptDraws(prompts, SAMPLES, 0)
    request = SamplingRequest(prompts, [[3] * PROMPT] * PROMPTS, SAMPLES, draws, on_token=look)
    with (
        mock.patch.object(_Body, "__call__", body),
        mock.patch.object(SegmentDecoding, "attend_to_kept", attending),
        mock.patch.object(torch, "Event", mock.Mock()),
        mock.patch.object(torch.Tensor, "pin_memory", lambda part: part),
        counted,
        torch.autocast("cuda", torch.bfloat16, cache_enabled=False),
        fake.engine.sampling(torch.bfloat16),
        suppress(EnoughError),
    ):
        Sampler(COMPLETION, cuda_graphs=False).sample(fake.engine, build_tokenizer(), request)
    waits = {place: number - seen[0].get(place, 0) for place, number in seen[-1].items() if number > seen[0].get(place, 0)}
    planned = dataclasses.replace(plan(share)[0]["generating"], gradients=0, optimizer=0)  # which there are none of yet
    peak = counted.live.peak / planned.total
    of_layer = work(*layers[-2:])  # from one's attention to the next one's
    of_layer["ideal"] = of_layer["bytes"] / ideal_bytes()
    return found(counted.known, before=seen[0], waits=waits, peak=peak, layer=of_layer, token=work(*layers[-3::2]))


def ideal_bytes():
    """Bytes of a layer's weights with LoRA, and of all keys and values, each once."""
    size, heads, groups = CONFIG.head_dim, CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = [(hidden, size * heads), (hidden, size * groups), (hidden, size * groups), (size * heads, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    tokens = PROMPTS * (PROMPT + SAMPLES * COMPLETION)
    return sum(2 * m * n + 4 * LORA["rank"] * (m + n) for m, n in shapes) + 4 * tokens * groups * size


def main():
    warnings.simplefilter("ignore")
    counts = {
        "steps": steps(0),
        "steps of a hybrid": steps(0.1),
        "steps of one long row": steps(0, ONE_LONG),
        "planted steps": planted(),
        "scoring": scoring(ExactGradients()),
        "sketches": scoring(SketchedGradients()),
        "rollout": rollout(0),
        "rollout of a hybrid": rollout(0.1),
        "most logits": Backend().most_logits(torch.device("cuda")) // CONFIG.vocab_size,
    }
    Path(sys.argv[1]).write_text(json.dumps(counts))


if __name__ == "__main__":
    main()

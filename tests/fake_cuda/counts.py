"""Counts of all passes of a run on a fake GPU, by the objects of a run: `python counts.py FILE [RUN...]`.

The file is JSON; without names of runs it has all. The model has the sizes of Qwen3-0.6B and two layers.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from collections import Counter as Numbers
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_gpu

with tempfile.TemporaryDirectory() as folder:
    fake_gpu.load(Path(folder))

import device
import torch
from fake_model import adapted, without_compiler
from fake_run import fit, policy_of
from ideal import Ideal
from known import tell
from lightning.pytorch import Callback
from tiny_models import build_tokenizer
from torch.utils._python_dispatch import _disable_current_modes
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
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.memory import RunSettings, TrainerFlags, fitting, peaks
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.rollout import Sampler, VLLMServerSampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import _Decoder
from hybrid_lightning.rollout.vllm.transfer import Update
from hybrid_lightning.runner import Backend, SegmentDecoding, logprobs, pass_memory, token_logprobs
from hybrid_lightning.sharding.weights import Weights
from hybrid_lightning.training.calibration import training_losses
from hybrid_lightning.training.step import OptimizerStep
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

SIZES = PROMPTS, SAMPLES, PROMPT, COMPLETION = 4, 8, 384, 256
LAYERS = 2
ONE_LONG = (1, 1, 384, 16_000)
MANY = (8, 8, 512, 640)  # on a card of few GiB
CONFIG = Qwen3Config(**{**plan_qwen3.config("Qwen3-0.6B").to_dict(), "num_hidden_layers": LAYERS, "layer_types": None})
LORA = {"rank": 16, "alpha": 32}


def settings_of(share, sizes=SIZES, card=None):
    """Such a run, to be planned: on a card with this memory, or with all rows in one pass."""
    planning = HybridAdapterSetup(ModuleBudget(share), **LORA).planning
    flags = TrainerFlags(on_cpu=False, precision="bf16-mixed", device_bytes=card)
    prompts, samples, prompt, completion = sizes
    lengths = {"prompt_tokens": prompt, "completion_tokens": completion, "dtype": torch.bfloat16}
    schedule, most = RolloutSchedule(prompts, samples), None if card else 10**6
    return RunSettings(CONFIG, schedule=schedule, planning=planning, flags=flags, max_tokens_per_micro_batch=most, **lengths)


class Phases:
    """What the phases of a run do and hold."""

    def __init__(self, counted):
        self.known, self.live, self.found = counted.known, counted.live, {}  # name -> sums of the work, and the largest peak

    def forget(self, names):
        for name in names:
            self.found.pop(name, None)

    def begin(self):
        self.live.restart_peak()
        self._before = dataclasses.replace(self.known.counts)

    def end(self, name):
        done, earlier = work(self._before, self.known.counts), self.found.get(name, {})
        peak = max(self.live.peak, earlier.get("peak", 0))
        self.found[name] = {kind: number + earlier.get(kind, 0) for kind, number in done.items()} | {"peak": peak}
        self.begin()


class SecondStep(Callback):
    """What the second step waits for, and what its phases do."""

    def __init__(self, phases):
        self.phases, self.places = phases, phases.known.places

    def on_train_batch_start(self, *_):
        self.places.clear()
        self.phases.forget(("forward", "backward", "optimizer step"))  # of the first step
        self.phases.begin()

    def on_before_backward(self, *_):
        self.phases.end("forward")

    def on_after_backward(self, *_):
        self.phases.end("backward")

    def on_train_batch_end(self, *_):
        self.phases.end("optimizer step")
        self.waits = dict(self.places)


def rows_of(known, prompts, samples, prompt, completion):
    """Rows of full length. Each prompt has different tokens."""
    prompt_ids = torch.arange(prompts).repeat_interleave(samples)[:, None].expand(-1, prompt)
    ids = torch.zeros(prompts * samples, completion, dtype=torch.long)
    masks = [torch.ones_like(part, dtype=torch.bool) for part in (prompt_ids, ids)]
    return Sequences(*map(known.put, (prompt_ids, masks[0], ids, masks[1], ids)))


def model(share):
    return adapted(CONFIG, LAYERS, share, LoraSettings(**LORA))


def ideal(fake, sizes=SIZES):
    return Ideal(CONFIG, LORA["rank"], fake.plan.full_modules if hasattr(fake, "plan") else None, sizes)


def work(begin, end):
    return {name: getattr(end, name) - getattr(begin, name) for name in ("kernels", "bytes", "flops")}


def found(known, fake, **more):
    known_of = {"copies": known.copies, "atomics": known.counts.atomics, "too long": known.too_long, "logits": known.logits}
    return {**known_of, "passes": fake.runner.passes(), **more}


def steps(share, sizes=SIZES, most=10**6, **loss):
    """Two optimizer steps of GSPO with a KL term and clipping, after the passes that it needs beforehand."""
    fake = model(share)
    counted, module = fake.counted(), policy_of(fake, most, **loss)
    known, sequences = counted.known, rows_of(counted.known, *sizes)
    rows = len(sequences)
    numbers = [fake.fake(torch.zeros(size)) for size in ((rows,), sequences.completion_ids.shape)]
    second = SecondStep(phases := Phases(counted))
    with without_compiler(), counted:
        batch = PolicyBatch(sequences, *numbers, None, None, *2 * (float(rows), float(rows * sizes[-1])))
        phases.begin()
        module.task.add_logprobs([batch], True)
        phases.end("on-policy")
        known.places.clear()
        (batch,) = module.task.add_logprobs([batch], False)
        phases.end("log-probabilities")
        before = dict(known.places)
        fit(module, fake, batch, 2, second)
    least = ideal(fake, sizes)
    flops = {"forward": least.forward(), "backward": least.backward(), "optimizer step": 0}
    flops["on-policy"] = least.forward(False, adapter=False)
    flops["log-probabilities"] = least.forward(False) + least.forward(False, adapter=False)
    return found(known, fake, before=before, waits=second.waits, phases=phases.found, least=flops)


def planned_steps(share, sizes=SIZES, **loss):
    """The same, beside the plan of its peaks."""
    settings, largest = dataclasses.replace(settings_of(share, sizes), entropy_gradient=bool(loss)), peaks._largest
    with mock.patch.object(peaks, "_largest", side_effect=largest) as calls:
        planned = plan_method(settings).peaks
    (_, forward, backward), passes = calls.call_args.args  # what is held at these moments, and what the pass takes
    plan = {"forward": forward.total + passes.activations + passes.logits, "backward": backward.total + passes.backward}
    plan |= {"optimizer step": planned["optimizer step"].total, "log-probabilities": planned["updating"].total}
    done = steps(share, sizes, **loss)
    return {**done, "of plan": {name: done["phases"][name]["peak"] / size for name, size in plan.items()}}


def planted():
    """Steps into which mistakes are put that the counts have to show."""
    log = OptimizerStep._log

    def mistaken(step, batch, shares):
        if not float(shares["loss"]):
            weight = step._passes.policy.model.get_input_embeddings().weight.clone()
            weight.detach().index_add_(0, torch.zeros(1, dtype=torch.long, device=weight.device), weight[:1].detach())
            torch.cuda.synchronize()
            torch.zeros(1).to(weight.device, non_blocking=True)
        log(step, batch, shares)

    with mock.patch.object(OptimizerStep, "_log", mistaken), mock.patch.object(Backend, "most_logits", lambda *_: 10**12):
        return planned_steps(0)


def wide():
    """Steps whose window hides no token."""
    windows = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}
    windows["layer_types"] = ["sliding_attention"] * LAYERS
    with mock.patch.dict(globals(), CONFIG=Qwen3Config(**{**CONFIG.to_dict(), **windows})):
        return planned_steps(0)


def unplain():
    """Steps with an output layer that is more than a product."""
    patches = [mock.patch.object(module, "plain_projection", lambda _: None) for module in (logprobs, pass_memory)]
    with patches[0], patches[1]:
        return planned_steps(0)


def on_a_card(gib, share=0):
    """Steps on a small card, with the changes of their plan with which they fit it."""
    settings = settings_of(share, MANY, card=int(gib * 2**30))
    changes, plan = fitting.find_changes(settings, needs_reference=True)
    most = next((change.settings.get("max_tokens_per_micro_batch") for change in changes), None)
    with mock.patch.object(device.properties, "total_memory", settings.flags.device_bytes):
        done = steps(share, MANY, most)
    peak, room = max(phase["peak"] for phase in done["phases"].values()), fitting.room(settings)
    named = [change.overrides.partition("=")[0] for change in changes]
    numbers = done["waits"]["_local_scalar_dense in step.micro_batch"]  # which the host reads of a micro-batch
    return {"changes": named, "numbers": numbers, "of room": peak / room, "of plan": {"card": peak / plan.peak_bytes}}


def scoring(mode):
    """The gradients of calibration rollouts, as modules are scored by them."""
    fake = model(None)
    counted, candidates = fake.counted(), find_candidates(fake.model)
    sequences, phases = rows_of(counted.known, *SIZES), Phases(counted)
    numbers = [counted.known.put(torch.ones(size)) for size in ((len(sequences),), sequences.completion_ids.shape)]
    fake.model.requires_grad_(False)
    with without_compiler(), counted, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        batch, rows = PolicyBatch(sequences, *numbers), slice(0, len(sequences))
        losses = training_losses("reward", batch, rows, [rows], GSPOLoss(), lambda rows: token_logprobs(fake.runner, rows, 1.0))
        counted.known.places.clear()
        phases.begin()
        Scoring(fake.model, candidates, losses, TailEnergy(), 16, mode).collect_gradients(lambda seen: None)
        phases.end("scoring")
    least, peak = ideal(fake), plan_method(settings_of(0.1)).peaks["scoring"].total
    flops = {"scoring": least.forward() + least.backward() + least.sketches() * isinstance(mode, SketchedGradients)}
    found_in = {"waits": counted.known.places, "modules": len(candidates), "phases": phases.found, "least": flops}
    return found(counted.known, fake, **found_in, **{"of plan": {"scoring": phases.found["scoring"]["peak"] / peak}})


class EnoughError(Exception):
    """As many tokens were sampled as are looked at."""


def rollout(share, tokens=48, **options):
    """A rollout from its prompts' texts on, by the sampler, until so many tokens.

    Every fourth row ends by a stop token after 5 tokens, another fourth by their own limit after 21. The host reads this after 32
    and 48 tokens, and the rows leave.
    """
    fake = model(share)
    counted, seen, layers, tokenizer = fake.counted(), [], [], build_tokenizer()
    known, attend, choose = counted.known, SegmentDecoding.attend_to_kept, _Decoder._choose

    def chosen(decoder, logits, rows, step):
        token, logprob = choose(decoder, logits, rows, step)
        with _disable_current_modes():
            tell(token, torch.where((known.values(rows) % 4 == 0) & (step == 4), tokenizer.eos_token_id, 5))
        return token, logprob

    def attending(decoding, number, *given):
        layers.append((len(seen), dataclasses.replace(known.counts)))
        return attend(decoding, number, *given)

    def look(alive, token):
        seen.append((alive, dict(known.places), dataclasses.replace(known.counts)))
        if token == tokens:
            raise EnoughError

    prompts = [Prompt(text="", index=index) for index in range(PROMPTS)]
    limits = [21 if row % 4 == 1 else COMPLETION for row in range(PROMPTS * SAMPLES)]
    sampler, draws = Sampler(COMPLETION, **options), PromptDraws(prompts, SAMPLES, 0)
    listeners = {"on_token": look, "on_tokens": lambda *_: None}
    request = SamplingRequest(prompts, [[3] * PROMPT] * PROMPTS, SAMPLES, draws, limits=limits, **listeners)
    with (
        without_compiler(),
        mock.patch.object(_Decoder, "_choose", chosen),
        mock.patch.object(SegmentDecoding, "attend_to_kept", attending),
        counted,
        torch.autocast("cuda", torch.bfloat16, cache_enabled=False),
        fake.runner.sampling(torch.bfloat16),
        suppress(EnoughError),
    ):
        sampler.sample(fake.runner, tokenizer, request)
    alive, waits, counts = zip(*seen, strict=True)
    # Token, running rows, and their own keys; a graph's cost is that of the step that was recorded.
    looked_at = {"plain": (8, 32, 7), "replayed": (20, 32, 8), "fewer rows": (36, 24, 35), "fewer, replayed": (46, 24, 39)}
    phases = {name: work(counts[token - 2], counts[token - 1]) for name, (token, *_) in looked_at.items()}
    for name, (token, *_) in looked_at.items():
        phases[name]["launches"] = counts[token - 1].launches - counts[token - 2].launches
    least = ideal(fake)
    flops = {name: least.token(rows, rows * (PROMPT + own)) for name, (_, rows, own) in looked_at.items()}
    of_layer = work(*(count for number, count in layers if number == 7))  # from one's attention to the next one's
    of_layer["ideal"] = of_layer["bytes"] / least.bytes_of_layer(PROMPTS * PROMPT + PROMPTS * SAMPLES * 7)
    more = {place: number - waits[0].get(place, 0) for place, number in waits[-1].items() if number > waits[0].get(place, 0)}
    plan = plan_method(dataclasses.replace(settings_of(share), sampler=sampler)).peaks["generating"]
    plan = dataclasses.replace(plan, gradients=0, optimizer=0).total  # which there are none of yet
    of_run = {"before": waits[0], "waits": more, "alive": dict(Numbers(alive)), "replayed": known.replayed, "layer": of_layer}
    of_run["pools"] = known.pools
    return found(known, fake, **of_run, phases=phases, least=flops, **{"of plan": {"rollout": counted.live.peak / plan}})


class Servers(VLLMServerSampler):
    """Two that take weights without waiting."""

    def __init__(self, transfer):
        super().__init__(urls=["http://a:1", "http://b:1"])
        for server in self._servers:
            server._facts = SimpleNamespace(backend="nccl")
        self._taking, self._transfers = list(self._servers), dict.fromkeys(self._servers, transfer)

    def _in_threads(self, servers, call):
        done = {server: Future() for server in servers}
        for server, future in done.items():
            future.set_result(call(server))
        return done


def sent(share):
    """The weights, as two servers are given them, from one buffer."""
    fake, given = model(share), []
    counted = fake.counted()
    phases, served = Phases(counted), SimpleNamespace(dtype=torch.bfloat16, device=fake.device)
    servers = Servers(SimpleNamespace(give=given.append))
    with counted:
        weights = CurrentWeights(fake.model, Weights(), "base", 0, True)
        phases.begin()
        servers._send(Update(weights.shapes(True), torch.bfloat16, True), weights.stream(True), served)
        phases.end("sent")
    held = sum(part.numel() * part.element_size() for part in fake.model.parameters())
    buffer = max(part.untyped_storage().nbytes() for part in given)
    sizes = {"weights": len(weights.shapes(True)), "given": len(given), "beside": phases.found["sent"]["peak"] - held - buffer}
    flops = {"sent": ideal(fake).merged()}
    return found(counted.known, fake, waits=counted.known.places, phases=phases.found, least=flops, **sizes)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # for whole numbers, beside other processes
    runs = {
        "steps": lambda: planned_steps(0),
        "steps of a hybrid": lambda: planned_steps(0.1),
        "steps of one long row": lambda: planned_steps(0, ONE_LONG),
        "planted steps": planted,
        "steps with an entropy bonus": lambda: planned_steps(0, entropy_coef=0.01),
        "steps of an unplain output": unplain,
        "scoring": lambda: scoring(ExactGradients()),
        "sketches": lambda: scoring(SketchedGradients()),
        "rollout": lambda: rollout(0),
        "rollout by top-p": lambda: rollout(0.1, top_p=0.9),
        "rollout by top-k": lambda: rollout(0, top_k=50),
        "weights": lambda: sent(0.1),
        "card of 6 GiB": lambda: on_a_card(6),
        "card of 5 GiB": lambda: on_a_card(5),
        "full on a card of 7 GiB": lambda: on_a_card(7, 1.0),
        "steps in a wide window": wide,
    }
    counts = {name: run() for name, run in runs.items() if name in sys.argv[2:] or len(sys.argv) == 2}
    counts["most logits"] = Backend().most_logits(torch.device("cuda")) // CONFIG.vocab_size
    Path(sys.argv[1]).write_text(json.dumps(counts))


if __name__ == "__main__":
    main()

"""Worker: one part of the day with a GPU, a function of the part's name that yields what it has found so far (see gpu_day.py)."""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import faulthandler
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.commands import ROOT
from benchmarks.memory import plan_qwen3, run_memory
from benchmarks.memory.cases import MemoryCase
from benchmarks.prepare import make_prompts
from benchmarks.speed.run_methods import build_adapter
from benchmarks.training import Differences, Gated, build_policy, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings, Workload
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.engine import PackedSequences, token_logprobs
from hybrid_lightning.engine.attention import AttentionSettings
from hybrid_lightning.engine.passes import separate_logits
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.types import Prompt, Sequences

Found = dict[str, Any]
# What is rehearsed on a CPU is as small as a model can be.
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STEPS = 4  # that are timed
Trained = tuple[PolicyModule, Trainer, Found]  # with what is known of the steps


class Clock(Gate):
    """Lets steps through, and notes their seconds, and how many graphs are compiled after each; prints both for the log."""

    def __init__(self, cuda: bool, steps: int) -> None:
        self.cuda, self.steps = cuda, steps
        self.seconds, self.graphs = list[float](), list[int]()

    def ready(self, *_: Any, **__: Any) -> None:
        """There is no parent that waits for it."""

    def wait(self) -> bool:
        self.begin = time.perf_counter()
        return len(self.seconds) < self.steps

    def done(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)
        self.graphs.append(counters["stats"]["unique_graphs"])
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s, {self.graphs[-1]} graphs", flush=True)


class LastStep(Differences):
    """Compares the log-probabilities of the last step alone, which costs a pass, and keeps what the run says of its passes."""

    passes = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.passes = pl_module.engine.description()


class Work:
    """What the device does within this context, by torch's profiler."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.recorder = cuda, profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def __enter__(self) -> None:
        self.recorder.start()
        self.begin = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin
        self.recorder.stop()

    def times(self) -> dict[str, float]:
        """Share of the time of each kernel, on a CPU of each operator, the longest first."""
        name = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        kernels = [entry for entry in self.recorder.key_averages() if not self.cuda or entry.device_type != DeviceType.CPU]
        shares = {entry.key[:80]: getattr(entry, name) / 1e6 / self.seconds for entry in kernels if not entry.is_user_annotation}
        return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


class Day:
    """The device, the sizes, and the model, with random weights in the shape of Qwen3-0.6B, which the first part makes.

    Args:
        folder: For the model and what parts write.
        device: `cuda`, or `cpu` for tiny sizes.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.cuda = folder, device, device == "cuda"
        self.model = folder / "model"
        self.config = plan_qwen3.config("Qwen3-0.6B")
        self.full = Workload("full", 32, 8, 384, 256, 256, rank=16, alpha=32, learning_rate=1e-4)
        self.check = replace(self.full, prompts=4, samples=4, max_new_tokens=32)
        self.long = replace(self.full, prompts=8, max_new_tokens=2048)
        if not self.cuda:
            self.config = Qwen3Config(vocab_size=512, head_dim=16, tie_word_embeddings=True, **TINY)
            self.full = self.check = self.long = replace(
                self.full, prompts=4, samples=4, prompt_tokens=8, max_new_tokens=6, rank=4
            )
        if not (self.model / "prompts.json").exists():
            self.make_model()

    def make_model(self) -> None:
        """The tokenizer is the embedded policy's: which tokens there are does not matter."""
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).save_pretrained(self.model)
        tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())
        tokenizer.save_pretrained(self.model)
        prompts = make_prompts(self.full, tokenizer, (STEPS + 1) * self.full.prompts, random.Random(0))
        (self.model / "prompts.json").write_text(json.dumps(prompts))

    def settings(self, workload: Workload, steps: int) -> Settings:
        return Settings(workload, self.model, self.device, torch.get_num_threads(), steps, seed=0)

    def train(self, workload: Workload, steps: int, *callbacks: Callback, method: str = "lora", **given: Any) -> Trained:
        """Train a policy on completions of full length, with options of `build_policy` in `policy`, and of `train` besides."""
        seed_everything(0, verbose=False)
        settings, clock, last = self.settings(workload, steps), Clock(self.cuda, steps), LastStep()
        policy = build_policy(settings, **given.pop("policy", {}))
        policy.pretrained.stop_ids = [10**9]  # no such token: nothing ends
        adapter = build_adapter(method, workload.rank, workload.alpha)
        trainer = train(settings, policy, [*callbacks, adapter, last, Gated(clock)], **given)
        apart = torch.cat(last.found) if last.found else torch.zeros(1)
        found: Found = {
            "seconds of the steps but the last": clock.seconds[:-1],
            "graphs compiled after each": clock.graphs,
            "sampling and training apart in the last, nats": f"mean {apart.mean():.2g}, largest {apart.max():.2g}",
            "passes": last.passes,
            "finite weights": bool(weights_of(policy).isfinite().all()),
        }
        return policy, trainer, found

    def peak(self) -> Found:
        return {"peak, GiB": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else {}


def weights_of(policy: PolicyModule) -> Tensor:
    """All trained weights, on the CPU."""
    return torch.cat([part.detach().float().flatten().cpu() for part in policy.parameters() if part.requires_grad])


def off(found: Tensor, exact: Tensor) -> float:
    """How far numbers are off, as a share of their size."""
    return float((found - exact).detach().double().norm() / exact.detach().double().norm())


def passes(day: Day) -> Iterator[Found]:
    yield {"CUBLAS_WORKSPACE_CONFIG": os.environ["CUBLAS_WORKSPACE_CONFIG"]}
    if day.cuda:
        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total,compute_cap,power.limit", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        yield {"driver, memory, capability, power": told, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    torch.manual_seed(0)
    for rows in (8, 256):
        x, weight = (torch.randn(n, day.config.hidden_size, device=day.device) for n in (rows, day.config.intermediate_size))
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = x.to(dtype), weight.to(dtype)
            yield {f"products of {rows} rows off in {dtype}": off(x @ weight.t(), x.double() @ weight.double().t())}
    policy, _, found = day.train(day.check, 2)
    yield found
    assert policy.last_rollout is not None
    engine, sequences = policy.to(day.device).engine, policy.last_rollout[0].sequences.to(day.device)
    heads = (day.config.num_attention_heads, day.config.num_key_value_heads, day.config.num_key_value_heads)
    packed = engine.packed(sequences)
    parts = [torch.randn(len(packed.ids), n, day.config.head_dim, device=day.device).bfloat16() for n in heads]
    repeated = PackedSequences(sequences, engine.backend)
    exact = attended(repeated, [part.float() for part in parts])
    for name, packing in (("as it is used", packed), ("with repeated keys", repeated)):
        errors = [off(one, other) for one, other in zip(attended(packing, parts), exact, strict=True)]
        yield {f"attention off {name}: result, gradients of queries, keys, values": errors}
    with torch.no_grad():
        with torch.autocast(day.device, torch.bfloat16):
            found = {"ours": token_logprobs(engine, sequences, 1.0)[0], "transformers'": plain_logprobs(policy, sequences)}
        policy.model.float()
        exact = plain_logprobs(policy, sequences)
    for name, values in found.items():
        apart = (values - exact)[sequences.completion_mask].abs()
        yield {f"log-probabilities off in nats, {name}": f"mean {apart.mean():.2g}, largest {apart.max():.2g}"}


def attended(packing: PackedSequences, parts: list[Tensor]) -> list[Tensor]:
    """The result of attention, and the gradients of queries, keys and values."""
    query, key, value = (part.clone().requires_grad_() for part in parts)
    result = packing.attend(0, query, key, value, AttentionSettings())
    read = len(packing.ids) - packing.filling
    return [result[:read], *torch.autograd.grad(result[:read].square().sum(), (query, key, value))]


def plain_logprobs(policy: PolicyModule, sequences: Sequences) -> Tensor:
    """Log-probabilities [B, T] of completion tokens by transformers' own pass."""
    logits = separate_logits(policy.model, sequences).float()
    return logits.log_softmax(-1).gather(2, sequences.completion_ids[:, :, None]).squeeze(2)


def gspo(day: Day) -> Iterator[Found]:
    from benchmarks.study.runner import QUIET, Curve, arguments
    from hybrid_lightning.cli import HybridLightningCLI

    small = {
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "data.validation_prompts": 8,
        "adapter.calibration_prompts": 8,
    }
    for device in dict.fromkeys((day.device, "cpu")):
        curve, begin = Curve(), time.perf_counter()
        options = {
            **QUIET,
            "trainer.accelerator": device,
            "trainer.default_root_dir": str(day.folder),
            **({} if day.cuda else small),
        }
        command = ["fit", f"--config={ROOT / 'configs' / 'gspo.yaml'}", *arguments(options)]
        HybridLightningCLI(args=command, trainer_defaults={"callbacks": [curve]})
        points = {f"{device}, val/avg@8 after {point['step']} steps": point["avg"] for point in curve.points}
        yield {**points, f"{device}, seconds": time.perf_counter() - begin}


def lora(day: Day) -> Iterator[Found]:
    yield {**day.train(day.full, STEPS + 1)[2], **day.peak()}


def hybrid(day: Day) -> Iterator[Found]:
    yield {**day.train(day.full, STEPS + 1, method="hybrid")[2], **day.peak()}


def graphs(day: Day) -> Iterator[Found]:
    policy = day.train(day.check, 1)[0].to(day.device)
    prompts = [Prompt(text, index=index) for index, text in enumerate(day.settings(day.full, 1).prompts[: day.full.prompts])]

    def generate(on: bool, tokens: int) -> Tensor:
        policy.sampler = Sampler(max_new_tokens=tokens, cuda_graphs=on)
        with torch.autocast(day.device, torch.bfloat16):
            made = policy.generate(prompts, day.full.samples, PromptDraws(prompts, day.full.samples, 0))
        return made.sequences.completion_ids.cpu()

    tokens, ids = day.full.max_new_tokens, {}
    try:
        for on in (False, True, False, True):  # the first of each compiles and records
            begin = time.perf_counter()
            ids[on] = generate(on, tokens)
            speed = day.full.rows * tokens / (time.perf_counter() - begin)
            with (work := Work(day.cuda)):
                generate(on, tokens // 4)
            name = "with graphs" if on else "without graphs"
            yield {f"tokens/s {name}": speed, f"share of the time that the device works {name}": sum(work.times().values())}
    except ConfigError as error:
        if day.cuda:
            raise
        yield {"not on a CPU": str(error)}
    else:
        yield {"share of equal tokens": float((ids[False] == ids[True]).float().mean())}


def memory(day: Day) -> Iterator[Found]:
    size = day.long
    for method in ("LoRA", "hybrid 10%"):
        sizes = (size.prompts, size.samples, size.prompt_tokens, size.max_new_tokens, size.rank)
        case = MemoryCase("", method, "bf16-mixed", *sizes, keep_start_weights=False, device=day.device)
        planned = run_memory.plan(case, day.model)["moments"]
        measured = run_memory.measure(case, day.model, counted=not day.cuda)["moments"]
        for moment, parts in measured.items():  # of the optimizer's step alone the plan says nothing
            held = [planned[moment]["total"]] if moment in planned else []
            held.append(parts["gpu" if day.cuda else "tensors"])
            yield {f"{method}, {moment}: GiB {'planned, ' if len(held) > 1 else ''}measured": [part / 2**30 for part in held]}


def scoring(day: Day) -> Iterator[Found]:
    timer = StepTimer()
    policy, _, _ = day.train(day.full, 0, timer, method="hybrid")
    assert policy.plan is not None
    yield {"seconds": timer.clock.seconds()["scoring"], **day.peak(), "fully trained": [*policy.plan.full_modules][:5]}


def resume(day: Day) -> Iterator[Found]:
    path = day.folder / "stopped.ckpt"
    for deterministic in (True, False):
        run = partial(day.train, day.check, method="hybrid", deterministic=deterministic)
        whole = weights_of(run(4)[0])
        run(2)[1].save_checkpoint(path)
        others = {"resumed": weights_of(run(4, checkpoint=path)[0]), "a second run": weights_of(run(4)[0])}
        for name, other in others.items():
            same = bool(torch.equal(whole, other))
            yield {f"{name}, deterministic={deterministic}": f"equal bits: {same}, {(whole - other).abs().max():.2g} apart"}


def uncompiled(day: Day) -> Iterator[Found]:
    yield day.train(day.check, 2)[2]


def float16(day: Day) -> Iterator[Found]:
    yield day.train(replace(day.check, dtype="float16" if day.cuda else "float32"), 2, precision="16-mixed")[2]


def nf4(day: Day) -> Iterator[Found]:
    from bitsandbytes.optim import AdamW8bit

    from hybrid_lightning.policy.quantization import NF4

    yield day.train(day.check, 2, policy={"quantization": NF4(), "optimizer": partial(AdamW8bit)})[2]


def vllm(day: Day) -> Iterator[Found]:
    from hybrid_lightning.rollout import VLLMSampler

    sampler = VLLMSampler(max_new_tokens=day.full.max_new_tokens, gpu_memory_utilization=0.3)
    yield {**day.train(day.full, STEPS + 1, policy={"sampler": sampler})[2], **day.peak()}


def trl(day: Day, **more: Any) -> Iterator[Found]:
    from benchmarks.speed.run_trl import Gated as TRLGated
    from benchmarks.speed.run_trl import HashedReward, build_trainer

    chosen = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "attn_implementation": "sdpa", **more}
    clock, reward = Clock(day.cuda, STEPS), HashedReward()
    build_trainer(day.settings(day.full, STEPS), chosen, str(day.folder / "trl"), reward, TRLGated(clock, reward, 1)).train()
    yield {"settings": json.dumps(chosen), "seconds of the steps": clock.seconds, **day.peak()}


def trl_vllm(day: Day) -> Iterator[Found]:
    yield from trl(day, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3)


def kernels(day: Day) -> Iterator[Found]:
    work = Work(day.cuda)

    class Profiled(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:  # the first step has compiled what is compiled
                work.__enter__()
            elif trainer.global_step == 2:
                work.__exit__()

    day.train(day.full, 3, Profiled())
    times = work.times()
    yield {"share of the time that the device works": sum(times.values()), "seconds of the step, profiled": work.seconds}
    yield {name: f"{share:.1%}" for name, share in [*times.items()][:15]}


def main() -> None:
    """Argument: `{"part": name, "device": "cuda" or "cpu", "folder": of the model, "out": file to add what is found to}`."""
    faulthandler.enable()  # what kills it says where it was
    request = json.loads(sys.argv[1])
    path, device = Path(request["out"]), request["device"]
    written = json.loads(path.read_text())
    for found in globals()[request["part"]](Day(Path(request["folder"]), device)):
        written["found"] |= found
        written["card"] = torch.cuda.get_device_name() if device == "cuda" else "none"
        made = path.with_suffix(".part")
        made.write_text(json.dumps(written, indent=1) + "\n")
        made.replace(path)


if __name__ == "__main__":
    main()

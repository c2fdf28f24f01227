"""Worker: one part of the GPU day, a function of the same name that yields its results so far (see gpu_day.py)."""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.commands import ROOT
from benchmarks.memory import plan_qwen3, run_memory
from benchmarks.memory.cases import MemoryCase
from benchmarks.prepare import make_prompts
from benchmarks.study.store import write
from benchmarks.training import Differences, Gated, build_adapter, build_policy, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings, Workload
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.runner import PackedSequences
from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.compiling import CODES
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.types import Prompt

Found = dict[str, Any]
Trained = tuple[PolicyModule, Trainer, Found]  # with what is known of the steps
STEPS = 4  # the measured steps
# The model of a rehearsal.
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


class Clock(Gate):
    """Lets steps through, and records their seconds and the number of compiled graphs after each; prints both for the log."""

    def __init__(self, cuda: bool, steps: int) -> None:
        self.cuda, self.steps, self.seconds, self.graphs = cuda, steps, list[float](), list[int]()

    def ready(self, *_: Any, **__: Any) -> None:
        """Do nothing: no parent waits for it."""

    def wait(self) -> bool:
        self.begin = time.perf_counter()
        return len(self.seconds) < self.steps

    def done(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)
        self.graphs.append(len(CODES))
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s, {self.graphs[-1]} graphs", flush=True)


class LastStep(Differences):
    """Compares log-probabilities only in the last step, which costs it a pass, and keeps the run's report on passes."""

    passes = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.passes = pl_module.policy.runner.description()


class Seen(Callback):
    """Keeps the training rollout."""

    rollout: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rollout = batch.rollout


class Day:
    """The device, the sizes, and a folder with the model: random weights in the shape of Qwen3-0.6B, made by the first part."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.cuda = folder, device, device == "cuda"
        self.model, self.config = folder / "model", plan_qwen3.config("Qwen3-0.6B")
        self.full = Workload("full", 32, 8, 384, 256, 256, learning_rate=1e-4)
        self.check = replace(self.full, prompts=4, samples=4, max_new_tokens=32)
        self.long = replace(self.full, prompts=8, max_new_tokens=2048)
        if not self.cuda:
            self.config = Qwen3Config(vocab_size=512, head_dim=16, tie_word_embeddings=True, **TINY)
            self.full = self.check = self.long = Workload("tiny", 4, 4, 8, 6, 6, rank=4, alpha=8)
        if not (self.model / "prompts.json").exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).save_pretrained(self.model)
            tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())  # any tokens will do
            tokenizer.save_pretrained(self.model)
            prompts = make_prompts(self.full, tokenizer, (STEPS + 1) * self.full.prompts, random.Random(0))
            (self.model / "prompts.json").write_text(json.dumps(prompts))

    def settings(self, workload: Workload, steps: int) -> Settings:
        return Settings(workload, self.model, self.device, torch.get_num_threads(), steps, seed=0)

    def train(self, workload: Workload, steps: int, *callbacks: Callback, method: str = "lora", **given: Any) -> Trained:
        """Train a policy on completions of full length, unless `stop_ids` end them.

        `policy` has the options of `build_policy`; the other options are for `train`.
        """
        seed_everything(0, verbose=False)
        settings, clock, last = self.settings(workload, steps), Clock(self.cuda, steps), LastStep()
        policy = build_policy(settings, **given.pop("policy", {}))
        policy.policy.pretrained.stop_ids = given.pop("stop_ids", [10**9])  # no such token: nothing ends
        trainer = train(settings, policy, [*callbacks, build_adapter(workload, method), last, Gated(clock)], **given)
        apart = torch.cat(last.found) if last.found else torch.zeros(1)
        found: Found = {
            "seconds of the steps but the last": clock.seconds[:-1],
            "graphs compiled after each": clock.graphs,
            "sampling and training apart in the last, nats": f"mean {apart.mean():.2g}, largest {apart.max():.2g}",
            "passes": last.passes,
            "finite weights": bool(weights_of(policy).isfinite().all()),
        }
        return policy, trainer, found | self.peak()

    def peak(self) -> Found:
        return {"peak, GiB": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else {}


def weights_of(policy: PolicyModule) -> Tensor:
    """All trained weights, on the CPU."""
    return torch.cat([part.detach().float().flatten().cpu() for part in policy.parameters() if part.requires_grad])


def off(found: Tensor, exact: Tensor) -> float:
    """Relative error of numbers."""
    return float((found - exact).detach().double().norm() / exact.detach().double().norm())


def work(cuda: bool, call: Callable[[], Any]) -> dict[str, float]:
    """Share of a call's time by kernel (on a CPU, by operator), longest first."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorder:
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        microseconds = 1e6 * (time.perf_counter() - begin)
    kernels = [each for each in recorder.key_averages() if not (cuda and each.device_type == DeviceType.CPU)]
    kernels = [each for each in kernels if not each.is_user_annotation]  # which are ranges of kernels
    times = {each.key[:80]: each.self_device_time_total if cuda else each.self_cpu_time_total for each in kernels}
    return {name: times[name] / microseconds for name in sorted(times, key=lambda name: -times[name])}


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
    seen = Seen()
    policy, _, found = day.train(day.check, 2, seen)
    yield found
    runner, sequences = policy.to(day.device).policy.runner, seen.rollout.sequences.to(day.device)
    used, repeated = runner.packed(sequences), PackedSequences(sequences, runner.backend)
    heads = (day.config.num_attention_heads, *[day.config.num_key_value_heads] * 2)
    parts = [torch.randn(len(used.ids), n, day.config.head_dim, device=day.device).bfloat16() for n in heads]
    exact = attended(repeated, [part.float() for part in parts])
    for name, packing in (("as it is used", used), ("with repeated keys", repeated)):
        errors = [off(one, other) for one, other in zip(attended(packing, parts), exact, strict=True)]
        yield {f"attention off {name}: result, gradients of queries, keys, values": errors}


def attended(packing: PackedSequences, parts: list[Tensor]) -> list[Tensor]:
    """The result of attention, and the gradients of queries, keys and values."""
    query, key, value = (part.clone().requires_grad_() for part in parts)
    result = packing.attend(0, query, key, value, AttentionSettings())[: len(packing.ids) - packing.filling]
    return [result, *torch.autograd.grad(result.square().sum(), (query, key, value))]


def gspo(day: Day) -> Iterator[Found]:
    from benchmarks.study.runner import QUIET, Curve, arguments
    from hybrid_lightning.cli.main import HybridLightningCLI

    small = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    small |= {"model.prompts_per_rollout": 8, "data.validation_prompts": 8, "adapter.calibration_prompts": 8}
    for device in dict.fromkeys((day.device, "cpu")):
        curve, begin = Curve(), time.perf_counter()
        options = {**QUIET, "trainer.accelerator": device, "trainer.default_root_dir": str(day.folder)}
        words = arguments(options if day.cuda else options | small)
        command = ["fit", f"--config={ROOT / 'configs' / 'gspo.yaml'}", *words]
        HybridLightningCLI(args=command, trainer_defaults={"callbacks": [curve]})
        points = {f"{device}, val/avg@8 after {point['step']} steps": point["avg"] for point in curve.points}
        yield {**points, f"{device}, seconds": time.perf_counter() - begin}


def steps(day: Day, **given: Any) -> Iterator[Found]:
    yield day.train(day.full, STEPS + 1, **given)[2]


def two_steps(day: Day, dtype: str = "bfloat16", **given: Any) -> Iterator[Found]:
    yield day.train(replace(day.check, dtype=dtype if day.cuda else "bfloat16"), 2, **given)[2]


lora, hybrid, uncompiled = steps, partial(steps, method="hybrid"), two_steps
float16 = partial(two_steps, dtype="float16", precision="16-mixed")


def graphs(day: Day) -> Iterator[Found]:
    size = day.full
    # Random weights give all tokens about the same probability: completions have about half the full length on average.
    ends = [*range(2 * day.config.vocab_size // size.max_new_tokens)]
    policy = day.train(day.check, 1, stop_ids=ends)[0].to(day.device)
    texts = enumerate(day.settings(size, 1).prompts[: size.prompts])
    prompts = [Prompt(text, index=index) for index, text in texts]

    def generate(count: int, on: bool, tokens: int) -> Tensor:
        """Token ids, -1 after the end."""
        policy.task.generation.sampler = Sampler(max_new_tokens=tokens, cuda_graphs=on)
        with torch.autocast(day.device, torch.bfloat16):
            made = policy.generate(prompts[:count], size.samples, PromptDraws(prompts[:count], size.samples, 0)).sequences
        return made.completion_ids.where(made.completion_mask, -1).cpu()

    for count in (1, size.prompts):
        rows, ids = count * size.samples, dict[bool, Tensor]()
        for on in (False, True, False, True) if day.cuda else (False,):  # the first of each compiles and records
            begin = time.perf_counter()
            ids[on] = generate(count, on, size.max_new_tokens)
            speed = int((ids[on] >= 0).sum()) / (time.perf_counter() - begin)
            share = sum(work(day.cuda, partial(generate, count, on, size.max_new_tokens // 2)).values())
            told = f"{rows} rows, cuda_graphs={on}"
            yield {f"tokens/s, {told}": speed, f"share of the time that the GPU is busy, {told}": share}
        lengths = (ids[False] >= 0).sum(dim=1)
        yield {f"tokens of {rows} rows": f"{lengths.min()} to {lengths.max()}, mean {lengths.float().mean():.1f}"}
        if day.cuda:
            yield {f"{rows} rows, the same tokens with graphs": torch.equal(ids[False], ids[True])}


def memory(day: Day) -> Iterator[Found]:
    size = day.long
    for method in ("LoRA", "hybrid 10%") if day.cuda else ("hybrid 10%",):
        sizes = (size.prompts, size.samples, size.prompt_tokens, size.max_new_tokens, size.rank)
        case = MemoryCase("", method, "bf16-mixed", *sizes, keep_start_weights=False, device=day.device)
        planned = run_memory.plan(case, day.model)["moments"]
        for moment, parts in run_memory.measure(case, day.model, counted=not day.cuda)["moments"].items():
            held = [planned.get(moment, planned["updating"])["total"], parts["gpu" if day.cuda else "tensors"]]
            yield {f"{method}, {moment}: GiB planned, measured": [part / 2**30 for part in held]}


def scoring(day: Day) -> Iterator[Found]:
    timer = StepTimer()
    plan = day.train(day.full, 0, timer, method="hybrid")[0].plan
    assert plan is not None
    yield {"seconds": timer.clock.seconds()["scoring"], "fully trained": [*plan.full_modules][:5], **day.peak()}


def resume(day: Day) -> Iterator[Found]:
    path = day.folder / "stopped.ckpt"
    for deterministic in (True, False) if day.cuda else (True,):
        run = partial(day.train, day.check, method="hybrid", deterministic=deterministic)
        whole = weights_of(run(4)[0])
        run(2)[1].save_checkpoint(path)
        for name, other in (("resumed", run(4, checkpoint=path)[0]), ("a second run", run(4)[0])):
            apart = (whole - weights_of(other)).abs().max()
            yield {f"{name}, deterministic={deterministic}": f"equal bits: {bool(apart == 0)}, {apart:.2g} apart"}


def nf4(day: Day) -> Iterator[Found]:
    from bitsandbytes.optim import AdamW8bit

    from hybrid_lightning.model.quantization import NF4

    yield from two_steps(day, policy={"quantization": NF4(), "optimizer": partial(AdamW8bit)})


def vllm(day: Day) -> Iterator[Found]:
    from hybrid_lightning.rollout import VLLMSampler

    sampler = VLLMSampler(max_new_tokens=day.full.max_new_tokens, gpu_memory_utilization=0.3)
    yield from steps(day, policy={"sampler": sampler})


def trl(day: Day, **more: Any) -> Iterator[Found]:
    from benchmarks.speed import run_trl

    chosen = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "attn_implementation": "sdpa", **more}
    clock, reward = Clock(day.cuda, STEPS), run_trl.HashedReward()
    settings, gated = day.settings(day.full, STEPS), run_trl.Gated(clock, reward, 1)
    run_trl.build_trainer(settings, chosen, str(day.folder / "trl"), reward, gated).train()
    yield {"settings": json.dumps(chosen), "seconds of the steps": clock.seconds, **day.peak()}


trl_vllm = partial(trl, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3)


def kernels(day: Day) -> Iterator[Found]:
    day.train(day.full, 1)  # compiles
    times = work(day.cuda, lambda: day.train(day.full, 1))
    yield {name: f"{times[name] / sum(times.values()):.1%}" for name in [*times][:15]}


def end_with(parent: int) -> None:
    """End this process and its children when the command has ended, so that no two parts run at the same time."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Argument: `{"part": name, "device": "cuda" or "cpu", "folder": of the model, "out": file, "parent": process}`."""
    faulthandler.enable()  # a fatal signal prints the stack
    request = json.loads(sys.argv[1])
    threading.Thread(target=end_with, args=(request["parent"],), daemon=True).start()
    path, device = Path(request["out"]), request["device"]
    written = json.loads(path.read_text())
    written["found"]["card"] = torch.cuda.get_device_name() if device == "cuda" else "a CPU: numbers say nothing"
    for found in globals()[request["part"]](Day(Path(request["folder"]), device)):
        written["found"] |= found
        write(written, path)


if __name__ == "__main__":
    main()

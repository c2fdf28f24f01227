"""Everything that can only be known on a GPU, in ten minutes at most: `python -m benchmarks.gpu_day`.

Checks (agreement of sampling and training, ways of attention, CUDA graphs, determinism, resume, precisions, bitsandbytes), then
speed, peak memory beside what was planned, vLLM and TRL where they are installed, and a profile. On a model with the shape of
Qwen3-0.6B and random weights, which is made here: nothing is downloaded. Writes a page and JSON that name the card. A part that
fails is written down as failed, and the others go on; then the exit status is 1.

Without a GPU it runs with tiny sizes on the CPU, in order to show that all parts run to their end: such numbers say nothing.
"""

import os

# cuBLAS reads it at the first product, for the whole process; deterministic kernels need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import argparse
import gc
import importlib.util
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.commands import command, versions
from benchmarks.tables import table
from benchmarks.training import Differences, GivenPrompts, HashedReward, quiet_trainer
from benchmarks.workloads import Settings, Workload
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.scorers import PreconditionedTail, Random, Scorer
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import RunSettings, SingleDevice, plan_memory
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.trainer import Trainer

Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a rollout."""

    layers: int = 28
    hidden: int = 1024
    inner: int = 3072
    heads: int = 16
    groups: int = 8
    vocabulary: int = 151_936
    prompts: int = 32
    samples: int = 8
    prompt_tokens: int = 384
    new_tokens: int = 256
    rank: int = 16
    share: float = 0.1


FULL = Sizes()
SMALL = replace(FULL, prompts=4, samples=4, prompt_tokens=64, new_tokens=32)  # of checks on the same model
TINY = Sizes(2, 64, 128, 4, 2, 512, 2, 4, 8, 6, 4, 0.1)


class Day:
    """The device, the sizes, and where the model lies.

    Args:
        folder: For the model and what parts write.
        tiny: Whether to run with tiny sizes, as on a CPU.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.on_gpu = torch.cuda.is_available()
        self.sizes, self.check_sizes = (TINY, TINY) if tiny else (FULL, SMALL)
        self.model = str(folder / "model")
        self.precision = "bf16-mixed"

    def make_model(self) -> None:
        """Random weights, and the tokenizer of the embedded policy: which tokens there are does not matter."""
        sizes = self.sizes
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.groups,
            head_dim=16 if self.tiny else 128,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(self.model)
        AutoTokenizer.from_pretrained(embedded_policy_path()).save_pretrained(self.model)

    def texts(self, sizes: Sizes) -> list[str]:
        """Prompts of the wanted length, one token a character."""
        drawn = torch.randint(10, (sizes.prompts, sizes.prompt_tokens), generator=torch.Generator().manual_seed(1))
        return ["".join(map(str, row)) for row in drawn.tolist()]

    def policy(self, sizes: Sizes, sampler: Any = None, **options: Any) -> PolicyModule:
        """A policy whose completions have full length."""
        policy = PolicyModule(
            loss=GRPOLoss(),
            reward=HashedReward(),
            model=self.model,
            sampler=sampler or Sampler(max_new_tokens=sizes.new_tokens),
            prompts_per_rollout=sizes.prompts,
            samples_per_prompt=sizes.samples,
            lr_lora=1e-4,
            lr_full=1e-5,
            **{"dtype": "bfloat16", **options},
        )
        policy.pretrained.stop_ids = [10**9]  # no such token: nothing ends
        return policy

    def train(
        self,
        policy: PolicyModule,
        sizes: Sizes,
        steps: int,
        *callbacks: Callback,
        checkpoint: Path | None = None,
        scorer: Scorer | None = None,
        **flags: Any,
    ) -> Trainer:
        """Train with a hybrid adapter, whose modules are drawn where no scorer is given."""
        seed_everything(0, verbose=False)
        budget, scorer = ModuleBudget(sizes.share), scorer or Random()
        adapter = HybridAdapterSetup(budget, scorer, rank=sizes.rank, alpha=2 * sizes.rank, keep_start_weights=False)
        flags = {"precision": self.precision, "max_steps": steps, "callbacks": [*callbacks, adapter], **flags}
        trainer = quiet_trainer(self.folder, "cuda" if self.on_gpu else "cpu", **flags)
        trainer.fit(policy, datamodule=GivenPrompts(self.texts(sizes)), ckpt_path=checkpoint)
        return trainer

    def timed(self, sampler: Any = None) -> tuple[PolicyModule, Found]:
        """A policy that was trained for four steps, and how long they took; the first compiles."""
        times, policy = Times(self), self.policy(self.sizes, sampler)
        self.train(policy, self.sizes, 4, times)
        tokens = self.sizes.prompts * self.sizes.samples * self.sizes.new_tokens
        return policy, {"seconds of steps": times.steps, "tokens/s of the later steps": 3 * tokens / sum(times.steps[1:])}

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Agreement(Differences):
    """Differences of the log-probabilities of sampling and training, and of those by the other kernels of attention."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first optimizer step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        engine, rows = pl_module.engine, batch.sequences.rows(slice(0, 8))
        self.results: Found = {
            "mean": float(self.found[0].mean()),
            "largest": float(self.found[0].max()),
            "passes": engine.passes(),
        }
        kept = engine._trial
        if not kept.why_no_segments:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                trained, _ = token_logprobs(engine, rows, 1.0)
                engine._trial = replace(kept, why_no_segments="compared here")
                other, _ = token_logprobs(engine, rows, 1.0)
                engine._trial = kept
            apart = (other - trained)[rows.completion_mask].abs()
            self.results |= {"segments and repeated keys, mean": float(apart.mean()), "largest of these": float(apart.max())}


def agreement(day: Day) -> Found:
    """How far sampling and training are apart, and attention by segments and by repeated keys."""
    compare = Agreement()
    day.train(day.policy(day.check_sizes), day.check_sizes, 1, compare)
    return compare.results


def graphs(day: Day) -> Found:
    """Whether replayed steps give the completions of plain ones, and tokens a second of both."""
    sizes = day.sizes
    policy = day.policy(sizes)
    day.train(policy, day.check_sizes, 0)
    if day.on_gpu:
        policy.cuda()
    prompts = GivenPrompts(day.texts(sizes)).train_prompts
    found: Found = {}
    completions = []
    for on in (False, True, False, True):
        policy.sampler = Sampler(max_new_tokens=sizes.new_tokens, cuda_graphs=on)
        day.synchronize()
        begin = time.perf_counter()
        try:
            with torch.autocast("cuda" if day.on_gpu else "cpu", torch.bfloat16):
                rollouts = policy.generate(prompts, sizes.samples, PromptDraws(prompts, sizes.samples, 0))
        except Exception as error:
            if day.on_gpu:
                raise
            return {"not on this device": str(error)}
        day.synchronize()
        name = "tokens/s with graphs" if on else "tokens/s without"
        found[name] = sizes.prompts * sizes.samples * sizes.new_tokens / (time.perf_counter() - begin)
        completions.append(rollouts.sequences.completion_ids.cpu())
    found["share of equal tokens"] = float((completions[2] == completions[3]).float().mean())
    return found


def weights_of(policy: PolicyModule) -> torch.Tensor:
    """All trained weights, on the CPU."""
    return torch.cat([part.detach().float().flatten().cpu() for part in policy.parameters() if part.requires_grad])


def apart(one: torch.Tensor, other: torch.Tensor, what: str = "") -> Found:
    """How far two runs' weights are apart."""
    return {f"equal bits{what}": bool(torch.equal(one, other)), f"largest difference{what}": float((one - other).abs().max())}


def determinism(day: Day) -> Found:
    """Whether two runs give the same bits, with torch's deterministic kernels and without."""
    found: Found = {}
    for deterministic in (False, True):
        ends = []
        try:
            for _ in range(2):
                policy = day.policy(day.check_sizes)
                day.train(policy, day.check_sizes, 2, deterministic=deterministic)
                ends.append(weights_of(policy))
        finally:  # other parts are to run as they would alone
            torch.use_deterministic_algorithms(False)
        found |= apart(*ends, ", deterministic" if deterministic else "")
    return found


def resume(day: Day) -> Found:
    """Whether a run that stops after two of four steps and goes on gives the bits of one that does not stop."""
    whole = day.policy(day.check_sizes)
    day.train(whole, day.check_sizes, 4)
    first = day.policy(day.check_sizes)
    path = day.folder / "stopped.ckpt"
    day.train(first, day.check_sizes, 2).save_checkpoint(path)
    second = day.policy(day.check_sizes)
    day.train(second, day.check_sizes, 4, checkpoint=path)
    return apart(weights_of(whole), weights_of(second))


def precisions(day: Day) -> Found:
    """Whether a step in each precision ends with finite weights."""
    found: Found = {}
    choices = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "32-true": "float32"}
    if day.on_gpu:  # on a CPU Lightning wants a plugin for it
        choices["16-mixed"] = "float16"
    for precision, dtype in choices.items():
        policy = day.policy(day.check_sizes, dtype=dtype)
        day.train(policy, day.check_sizes, 1, precision=precision)
        found[precision] = bool(weights_of(policy).isfinite().all())
    return found


def quantization(day: Day) -> Found:
    """A step on an NF4 base with 8-bit AdamW."""
    from bitsandbytes.optim import AdamW8bit

    from hybrid_lightning.policy.quantization import NF4

    policy = day.policy(day.check_sizes, quantization=NF4(), optimizer=partial(AdamW8bit))
    day.train(policy, day.check_sizes, 1)
    return {"finite weights": bool(weights_of(policy).isfinite().all())}


class Times(Callback):
    """Seconds of each step."""

    def __init__(self, day: Day) -> None:
        self.day, self.steps = day, []  # type: ignore[var-annotated]
        self._last = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first rollout begins."""
        self.day.synchronize()
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """A step, with its rollout, is over."""
        self.day.synchronize()
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self._last = now


def speed(day: Day) -> Found:
    """Seconds of a step, and the peak of memory beside what was planned."""
    sizes = day.sizes
    if day.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    policy, found = day.timed()
    found["tokens of a pass"] = policy.update.token_budget()
    if day.on_gpu:
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    memory = torch.cuda.get_device_properties(0).total_memory if day.on_gpu else None
    settings = RunSettings(
        policy.pretrained.config,
        sizes.prompt_tokens,
        sizes.new_tokens,
        sizes.prompts,
        sizes.samples,
        dtype=torch.bfloat16,
        mixed_precision=True,
        on_cpu=not day.on_gpu,
        lora=LoraSettings(sizes.rank, 2 * sizes.rank),
        plan=policy.plan,
        keep_start_weights=False,
        device_bytes=memory,
    )
    planned = [method for method in plan_memory(settings, SingleDevice()) if method.method == "plan"]
    found["planned GiB"] = max(peak.total for peak in planned[0].peaks.values()) / 2**30
    return found


def scoring(day: Day) -> Found:
    """Seconds and peak of memory of the default scorer on the rollouts that calibrate it, and which modules it chose first."""
    if day.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin, policy = time.perf_counter(), day.policy(day.sizes)
    day.train(policy, day.sizes, 0, scorer=PreconditionedTail())
    found: Found = {"seconds with loading": time.perf_counter() - begin}
    if day.on_gpu:
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    assert policy.plan is not None
    return {**found, "fully trained": list(policy.plan.full_modules)[:5]}


def vllm(day: Day) -> Found:
    """Seconds of a step with vLLM in the process."""
    if importlib.util.find_spec("vllm") is None:
        return {"left out": "vLLM is not installed"}
    from hybrid_lightning.rollout import VLLMSampler

    return day.timed(VLLMSampler(max_new_tokens=day.sizes.new_tokens, gpu_memory_utilization=0.3))[1]


def trl(day: Day) -> Found:
    """Seconds of a step of TRL's GRPOTrainer with PEFT, LoRA on all linear layers, and with vLLM where it is installed."""
    if importlib.util.find_spec("trl") is None:
        return {"left out": "TRL is not installed"}
    from transformers import TrainerCallback

    from benchmarks.speed.run_trl import HashedReward as TRLReward
    from benchmarks.speed.run_trl import build_trainer

    sizes, steps = day.sizes, [time.perf_counter()]

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """The first generation begins."""
            steps[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """A step, with its generation, is over."""
            day.synchronize()
            steps.append(time.perf_counter())

    with_vllm = day.on_gpu and importlib.util.find_spec("vllm") is not None
    names = (sizes.prompts, sizes.samples, sizes.prompt_tokens, sizes.new_tokens)
    workload = Workload("gpu_day", *names, rank=sizes.rank, alpha=2 * sizes.rank)
    (day.folder / "model" / "prompts.json").write_text(json.dumps(day.texts(sizes)))
    settings = Settings(workload, day.folder / "model", "cuda" if day.on_gpu else "cpu", torch.get_num_threads(), 4, 0)
    chosen: Found = {"per_device_train_batch_size": sizes.samples, "gradient_checkpointing": True}  # the latter is TRL's default
    if with_vllm:
        chosen |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    build_trainer(settings, chosen, str(day.folder / "trl"), TRLReward(), Clock()).train()
    return {"with vLLM": with_vllm, "seconds of steps": [after - before for before, after in pairwise(steps)]}


def kernels(day: Day) -> Found:
    """The kernels that take longest in a step, rollout and update."""
    policy = day.policy(day.sizes)
    activities = [ProfilerActivity.CUDA] if day.on_gpu else [ProfilerActivity.CPU]

    class Profiled(Callback):
        """Profiles the second step."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            """The first step has compiled what is compiled."""
            if trainer.global_step == 1:
                recorder.start()
            else:
                recorder.stop()

    recorder = profile(activities=activities)
    day.train(policy, day.sizes, 2, Profiled())
    key = "self_device_time_total" if day.on_gpu else "self_cpu_time_total"
    entries = sorted(recorder.key_averages(), key=lambda entry: -getattr(entry, key))[:15]
    return {entry.key[:80]: f"{getattr(entry, key) / 1e3:.1f} ms, {entry.count} times" for entry in entries}


PARTS: dict[str, Callable[[Day], Found]] = {
    part.__name__: part
    for part in (agreement, graphs, speed, scoring, resume, determinism, precisions, quantization, vllm, trl, kernels)
}


def run(day: Day, names: list[str], minutes: float, write: Callable[[dict[str, Found]], None]) -> dict[str, Found]:
    """Run parts one after another, and write all results after each; those for which no time is left are named."""
    results: dict[str, Found] = {}
    begin = time.perf_counter()
    for name in names:
        if time.perf_counter() - begin > 60 * minutes:
            results[name] = {"left out": f"the {minutes:g} minutes were over"}
            continue
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            found = PARTS[name](day)
        except Exception as error:  # the other parts are wanted all the same
            traceback.print_exc()
            found = {"FAILED": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        results[name] = {**found, "seconds": time.perf_counter() - start}
        write(results)
        gc.collect()
        if day.on_gpu:
            torch.cuda.empty_cache()
    return results


def card(day: Day) -> Found:
    """What it ran on."""
    if not day.on_gpu:
        return {"device": f"a CPU ({platform.machine()}): tiny sizes, whose numbers say nothing", "versions": versions()}
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "GiB": round(device.total_memory / 2**30, 1),
        "capability": f"{device.major}.{device.minor}",
        "CUDA": torch.version.cuda,
        "versions": versions(),
    }


def page(what: Found, sizes: Sizes, results: dict[str, Found]) -> str:
    """The results as Markdown."""
    lines = ["# A day with a GPU", "", "    python -m benchmarks.gpu_day", ""]
    lines += [f"{name}: {value}  " for name, value in what.items()]
    lines += ["", f"{asdict(sizes)}", ""]
    for name, found in results.items():
        rows = [(key, _text(value)) for key, value in found.items()]
        lines += [f"## {name}", "", (PARTS[name].__doc__ or "").strip(), "", table(("", "found"), rows, 2), ""]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command("gpu_day", __doc__, out=Path("runs/gpu_day"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which; default: all, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no part begins (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a GPU, too")
    return parser


def main() -> None:
    """Run, and write page and JSON."""
    given = build_parser().parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        day = Day(Path(folder), given.tiny or not torch.cuda.is_available())
        what = card(day)

        def write(results: dict[str, Found]) -> None:
            content = {"card": what, "sizes": asdict(day.sizes), "results": results}
            (given.out / "gpu_day.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            (given.out / "gpu_day.md").write_text(page(what, day.sizes, results), encoding="utf-8")

        day.make_model()
        results = run(day, given.parts, given.minutes, write)
        write(results)  # with those that did not begin
    print(f"written to {given.out}/gpu_day.md and gpu_day.json")
    if any("FAILED" in found for found in results.values()):
        sys.exit("error: some parts failed; see the page")


if __name__ == "__main__":
    main()

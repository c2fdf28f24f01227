"""From the records of `rollout_engines.py` to its page."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from engine_server import CACHE_GIB
from tables import table

NAMES = {
    "sampler": "`Sampler`, ours",
    "vllm": "`VLLMSampler`",
    "server": "`VLLMServerSampler`",
    "transformers": "transformers' `generate`",
    "trl": "TRL, vLLM in process",
}
MIB = 2**20
ALLOWED = 1.2  # times the largest layer, that an update may allocate
NOTHING = "-"


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the tables; the first rollout, the warm-up, counts for the start and the peak alone."""
    sides = {side: summarize_side(steps) for side, steps in measured["steps"].items()}
    whole = {side: spread([step_seconds(step) for step in steps[1:]]) for side, steps in measured["whole_steps"].items()}
    return {"engines": sides, "whole_steps": whole}


def summarize_side(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one engine."""
    rounds = steps[1:]
    tokens = sum(step["difference"]["tokens"] for step in rounds)
    found = {
        "tokens_per_s": spread([sum(step["lengths"]) / step["generate_s"] for step in rounds]),
        "step_s": spread([step["step_s"] for step in rounds]),
        "peak": max(step["peak"] for step in steps),
        "difference_mean": sum(step["difference"]["mean"] * step["difference"]["tokens"] for step in rounds) / tokens,
        "difference_max": max(step["difference"]["max"] for step in rounds),
        "difference_tokens": tokens,
    }
    if "update_all_s" in steps[0]:
        found["start_s"] = steps[0]["update_s"]
        found["update_changed_s"] = spread([step["update_s"] for step in rounds])
        found["update_all_s"] = spread([step["update_all_s"] for step in rounds])
        found["update_memory"] = rounds[-1]["update_memory"]
    return found


def step_seconds(step: dict[str, Any]) -> float:
    """Of a whole step: of TRL's there is only the time on the clock."""
    return float(step.get("step_s", step["seconds"]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def shown(values: dict[str, float] | None, digits: int) -> str:
    """Such as 1.20 (1.10-1.30)."""
    if values is None:
        return NOTHING
    return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f}-{values['max']:,.{digits}f})"


def markdown(records: dict[str, Any]) -> str:
    """The page."""
    parts = ["# Rollout engines compared", *(case(name, record) for name, record in records["cases"].items())]
    if records["cases"]:
        parts.append(MEANING)
    if records["training"]:
        parts += ["## Training with each engine", training(list(records["training"].values()))]
    else:
        parts += ["## Training with each engine", "Not run yet.", TRAINING]
    return "\n\n".join(parts) + "\n"


def case(name: str, record: dict[str, Any]) -> str:
    """What was measured of one model in one dtype."""
    settings, summary = record["settings"], record["summary"]
    prompt = f"{settings['prompt_tokens']} tokens" if settings["prompt_tokens"] else "products such as `347*6=`"
    return "\n\n".join(
        [
            f"## {name.rpartition('_')[0]}, {settings['dtype']}",
            f"    {record['about']['command']}",
            f"{settings['prompts']} prompts ({prompt}) x {settings['samples']} completions of at most "
            f"{settings['max_new_tokens']} tokens, {settings['minibatches']} optimizer steps a rollout. {where(record['about'])}",
            engines_table(summary["engines"], record["server_peak"]),
            memory_table(summary["engines"]),
            whole_steps(record),
        ]
    )


def engines_table(engines: dict[str, Any], server_peak: int) -> str:
    """Speed, memory and log-probabilities."""
    header = [
        "engine",
        "tokens/s",
        "sync, all (s)",
        "sync, changed (s)",
        "start (s)",
        "peak (MiB)",
        "difference, mean",
        "largest",
    ]
    rows = []
    for side, found in engines.items():
        peak = f"{found['peak'] / MIB:,.0f}" + (f" + {server_peak / MIB:,.0f}" if side == "server" else "")
        start = f"{found['start_s']:.1f}" if "start_s" in found else NOTHING
        rows.append(
            [
                NAMES[side],
                shown(found["tokens_per_s"], 0),
                shown(found.get("update_all_s"), 3),
                shown(found.get("update_changed_s"), 3),
                start,
                peak,
                f"{found['difference_mean']:.1e}",
                f"{found['difference_max']:.1e}",
            ]
        )
    return table(header, rows)


def memory_table(engines: dict[str, Any]) -> str:
    """What a sync allocates."""
    header = ["engine", "sync of", "allocates (MiB)", "largest layer (MiB)", "ratio", f"<= {ALLOWED}"]
    rows = []
    for side, found in engines.items():
        for what, bytes_ in found.get("update_memory", {}).items():
            ratio = bytes_["allocated"] / bytes_["largest"]
            sizes = [f"{bytes_[name] / MIB:.2f}" for name in ("allocated", "largest")]
            rows.append([NAMES[side], what, *sizes, f"{ratio:.2f}", "yes" if ratio <= ALLOWED else "NO"])
    return table(header, rows, left=2)


def whole_steps(record: dict[str, Any]) -> str:
    """Whole steps with LoRA, beside TRL, or why it made none."""
    rows = [[NAMES[side], shown(seconds, 2)] for side, seconds in record["summary"]["whole_steps"].items()]
    failure = record["trl_failure"]
    text = f"A whole step (rollout and update) with LoRA on all linear layers:\n\n{table(['', 's/step'], rows)}"
    if failure is None:
        return text
    found = record["about"]["versions"]
    text += (
        f'\n\nTRL {found["trl"]}, `GRPOTrainer` with `use_vllm=True, vllm_mode="colocate"` and vLLM {found["vllm"]}, made no '
        f"step here: `{failure}`."
    )
    if "weight_loader" in failure:
        text += (
            " On a CPU vLLM packs linear weights when it loads them. TRL sends weights by `model.load_weights`, which wants them "
            "as they were before. TRL without vLLM is in [vs_trl.md](vs_trl.md)."
        )
    return text


def where(about: dict[str, Any]) -> str:
    """Machine, versions, commit."""
    found = ", ".join(f"{name} {about['versions'].get(name)}" for name in ("vllm", "torch", "transformers", "trl"))
    machine, commit = about["machine"], about["versions"]["commit"]
    threads = f"{about['threads']} threads of each process"
    return (
        f"{about['device']}; {machine['processor']}, {machine['cores']} cores, {threads}; {found}; "
        f"commit {commit}, seed {about['seed']}."
    )


MEANING = f"""## What the numbers mean

- Median (smallest-largest) of the measured rollouts. Each engine is in a process that trains a policy of its own. The processes
  take turns, one rollout and its update each, and while one works the others sleep. The first rollout of each is discarded.
- All have the same weights, prompts, tokenizer and adapter: one module in ten, drawn by chance, is fully trained, the others
  have LoRA. Each samples its own tokens.
- `tokens/s`: generated tokens over the time of generation without the sync. For ours that includes the preparation of the
  weights for decoding. transformers' `generate` samples from the model that is trained, LoRA beside its weights, as TRL does
  without vLLM.
- `sync`: an update of the engine after a training step, of all weights or of those that training changes. `start` is the first
  one, which starts the engine; a server was started before.
- `peak`: the most memory that the process held at any time, training included: resident, or with CUDA what torch had allocated
  in it. After the plus is the sum over the server's processes. On a CPU vLLM's KV cache is in it from the start: by the rule of
  `VLLMSampler` 128 times the longest prompt with completion, of the server {CACHE_GIB} GiB.
- `difference`: of the log-probability of each sampled token to that of our own forward pass under the same weights, in nats.
- `allocates`: the most that a sync had allocated at a time, beside what was there before, in the process that trains, by torch's
  profiler, which does not see what other libraries allocate. The largest layer is that of the weights that are sent, in
  float32, with q, k and v as one and gate and up as one. An update may allocate {ALLOWED} times as much."""

TRAINING = """    python benchmarks/rollout_engines.py --train

trains with each engine and the seeds 0, 1 and 2. A run whose record is there is not repeated, so that the command can be given
again after it was stopped."""


def training(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracies of all runs, by config and engine."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["config"], run["steps"], run["engine"]), []).append(run)
    header = ["config", "steps", "engine", "metric", "seeds", "before", "after", "mean", "range", "seconds"]
    rows = []
    for (config, steps, engine), members in groups.items():
        members = sorted(members, key=lambda run: run["seed"])
        after = [100 * run["accuracy_after"] for run in members]
        before = ", ".join(f"{100 * run['accuracy_before']:.1f}" for run in members)
        seeds = ", ".join(str(run["seed"]) for run in members)
        cut = " (shortened)" if any(run["shortened"] for run in members) else ""
        rows.append(
            [
                f"`configs/{config}.yaml`",
                f"{steps}{cut}",
                NAMES[engine],
                members[0]["metric"],
                seeds,
                before,
                ", ".join(f"{value:.1f}" for value in after),
                f"{mean(after):.1f}",
                f"{max(after) - min(after):.1f}",
                f"{mean(run['seconds'] for run in members):.0f}",
            ]
        )
    places = dict.fromkeys(where(run["about"]).replace(f", seed {run['about']['seed']}.", ".") for run in runs)
    commands = dict.fromkeys(run["about"]["command"] for run in runs)
    return "\n\n".join(
        [
            "\n".join(f"    {command}" for command in commands),
            "Percent of the held-out problems, at temperature 1, after the last step. Seconds are those of a whole run, start, "
            "scoring and validations included. The runs with vLLM take `configs/rollout/vllm.yaml` and `vllm_server.yaml`, which "
            "correct for its probabilities. A run whose record is there is not repeated.",
            table(header, rows, left=5),
            *places,
        ]
    )

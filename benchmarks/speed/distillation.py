"""Compares a step of distillation with one of TRL's DistillationTrainer and PEFT: `python -m benchmarks.speed.distillation`.

The teacher has the size of the policy. One step: completions, whole distributions of both, and the update by their reverse KL.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.commands import CORES, about, check_at_least, check_can_run, command, entry
from benchmarks.pairs import Plan, compare, prepared
from benchmarks.speed.vs_trl import check
from benchmarks.tables import shown, spread, summarize_side, table
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

HEADER = ["model", "TRL s/step", "ours s/step", "TRL/ours (min-max)", "TRL peak GiB", "ours"]


def build_parser() -> argparse.ArgumentParser:
    where = {"device": "cpu", "threads": CORES, "seed": 0, "model": SMOLLM2, "out": Path("runs/distillation")}
    return command("speed.distillation", __doc__, pairs=5, **where)


def workload_of(model: str) -> Workload:
    """32 prompts with one completion each: TRL's trainer draws one completion for each row of the data."""
    name = "tiny" if model == "embedded" else "main"
    return replace(WORKLOADS[name], name="distillation", model=model, prompts=32, samples=1, minibatches=1)


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "pairs", "threads")
    check(argparse.Namespace(**vars(arguments), trl=[], ours_only=False, workload=["tiny"]))
    check_can_run([arguments.model], "give another --model, as embedded", arguments.device)
    workload, plan = workload_of(arguments.model), Plan.of(arguments, ("trl", "ours"), "benchmarks.speed.run_distillation")
    with prepared([workload], plan) as (folder,):
        measured = compare(workload, folder, plan)
    sides = {side: summarize_side(steps, plan.device) for side, steps in measured["steps"].items()}
    pairs = zip(measured["steps"]["trl"][1:], measured["steps"]["ours"][1:], strict=True)
    ratio = spread([one["seconds"] / other["seconds"] for one, other in pairs])
    times = [shown(sides[side]["seconds"]) for side in ("trl", "ours")]
    peaks = [f"{sides[side]['peak_bytes'] / 2**30:.2f}" for side in ("trl", "ours")]
    content = {**about(arguments), **measured, "summary": sides, "trl_over_ours": ratio}
    (path := arguments.out / "distillation.json").write_text(json.dumps(content, indent=1))
    print(table(HEADER, [[arguments.model, *times, shown(ratio), *peaks]]))
    print(f"\nWritten: {path}")


main = entry(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())

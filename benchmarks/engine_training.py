"""Training runs of `rollout_engines.py --train`: a config, the engine that makes its completions, a seed."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_server import serving
from pairs import HERE, BenchmarkError, environment, last_line
from workloads import SMOLLM2

ROOT = HERE.parent


@dataclass(frozen=True)
class Config:
    """A config of this project, and what it says of the model."""

    model: str
    dtype: str
    metric: str  # that its evaluations end with


CONFIGS = {
    "gspo": Config("embedded", "float32", "val/avg@8"),
    "smollm2_addition": Config(SMOLLM2, "bfloat16", "val/avg@4"),
}
# The overlay of each engine. Those of vLLM correct for its probabilities, as users have it.
OVERLAYS = {"sampler": None, "vllm": "rollout/vllm", "server": "rollout/vllm_server"}


@dataclass(frozen=True)
class Run:
    """One run."""

    config: str
    engine: str
    seed: int
    steps: int | None  # optimizer steps; None: those of the config

    @property
    def name(self) -> str:
        """Of its record; a shorter run is another one."""
        return "_".join([self.config, self.engine, f"seed{self.seed}", *([f"{self.steps}steps"] if self.steps else [])])

    def command(self, url: str | None, device: str) -> list[str]:
        """What is run, in a folder of its own."""
        configs = [self.config, *([overlay] if (overlay := OVERLAYS[self.engine]) else [])]
        command = [sys.executable, "-m", "hybrid_lightning", "fit"]
        command += [word for name in configs for word in ("--config", str(ROOT / "configs" / f"{name}.yaml"))]
        command += [f"--seed_everything={self.seed}", f"--model.seed={self.seed}", f"--data.source.seed={self.seed}"]
        command += [f"--trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "--trainer.enable_progress_bar=false"]
        command += [f"--model.sampler.urls=[{url}]"] if url else []
        return [*command, *([f"--trainer.max_steps={self.steps}"] if self.steps else [])]

    def train(self, start: Path, arguments: argparse.Namespace) -> dict[str, Any]:
        """Do it.

        Args:
            start: Folder of the start policy, for a server.
            arguments: Of the command line.

        Returns:
            The record.

        Raises:
            BenchmarkError: If the run fails.
        """
        folder, log = arguments.out / "training" / self.name, arguments.out / "logs" / f"{self.name}.log"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            url = None
            if self.engine == "server":
                dtype, server_log = CONFIGS[self.config].dtype, log.with_suffix(".server.log")
                url = stack.enter_context(serving(start, dtype, arguments.device, arguments.threads, None, server_log)).url
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            command = self.command(url, arguments.device)
            with log.open("w") as file:
                code = subprocess.run(
                    command,
                    cwd=folder,
                    env={**environment(arguments.threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    check=False,
                ).returncode
        if code:
            raise BenchmarkError(f"{self.name} ended with {code}: {last_line(log)} (its output is in {log})")
        (summary,) = folder.glob("runs/*/version_0/summary.json")
        return self.record(json.loads(summary.read_text()))

    def record(self, summary: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a run's `summary.json`."""
        names = ("steps", "accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "seconds", "training_seconds")
        kept = {name: summary[name] for name in (*names, "seconds_by_phase", "throughput")}
        about = {"config": self.config, "engine": self.engine, "seed": self.seed, "shortened": self.steps is not None}
        return {**about, "metric": CONFIGS[self.config].metric, **kept}


def training_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """All that were asked for, engines side by side for each seed."""
    for config in arguments.configs:
        for seed in dict.fromkeys(arguments.seeds):
            for engine in (name for name in OVERLAYS if name in arguments.engines):
                yield Run(config, engine, seed, arguments.steps)

"""Worker: a policy with one of the rollout engines, and the engine's cost in time and memory.

sampler       ours, in the training process, with the trained weights
vllm          vLLM in the training process
server        a vLLM server, which the parent has started
"""

import json
import time
from typing import Any

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import torch
from lightning.pytorch import Trainer as LightningTrainer

from benchmarks.processes import resident_bytes
from benchmarks.training import Differences, Gated, build_policy, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.scorers import Random
from hybrid_lightning.callbacks import HybridAdapterSetup, StepTimer
from hybrid_lightning.rollout import Sampler, VLLMSampler, VLLMServerSampler
from hybrid_lightning.rollout.interface import PolicyWeights, ServedModel, WeightsVersion
from hybrid_lightning.rollout.rollout_engine import RolloutEngine

_OTHER_VERSION = 2**20  # added to the step of weights that are sent again; otherwise the engine would skip them


class Watch:
    """Times the updates of an engine, which then go through this object, and repeats them with all weights."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._update = engine.update
        engine.update = self._timed  # type: ignore[method-assign]
        self._last: tuple[Any, ServedModel] | None = None
        self._seconds = 0.0

    def _timed(self, weights: PolicyWeights, model: ServedModel, everything: bool) -> None:
        begin = time.perf_counter()
        self._update(weights, model, everything)
        self._seconds += time.perf_counter() - begin
        self._last = weights, model

    def seconds(self) -> float:
        """Seconds of all updates since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def repeat(self, everything: bool) -> float:
        """Send the policy's current weights again, all of them or only the trained ones; returns the seconds."""
        assert self._last is not None
        weights, model = self._last
        weights.version = WeightsVersion(weights.version.step + _OTHER_VERSION, weights.version.digest)
        begin = time.perf_counter()
        self._update(weights, model, everything)
        return time.perf_counter() - begin


class TimedDifferences(Differences):
    """Also records the seconds of the comparison, which does not belong to a step."""

    seconds = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        begin = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.seconds += time.perf_counter() - begin


class Measured(Gated):
    """Reports the engine's cost for each rollout, and then measures updates with all weights."""

    def __init__(self, gate: Gate, timer: StepTimer, engine: RolloutEngine, differences: TimedDifferences) -> None:
        super().__init__(gate)
        self.timer, self.engine, self.differences = timer, engine, differences
        self.watch = Watch(engine)
        self.generate_s = 0.0

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        """Details of the step that has just ended, with measurements that are made only now."""
        if self.gate.cuda:
            torch.cuda.synchronize()
        step_s = time.perf_counter() - self.gate.begin - self.differences.seconds
        update_s, generate_s = self.watch.seconds(), self.timer.clock.seconds().get("generate", 0.0)
        differences = torch.cat(self.differences.found)
        found: dict[str, Any] = {
            "step_s": step_s,
            "generate_s": generate_s - self.generate_s - update_s,
            "update_s": update_s,  # the first starts the engine, the others send what training has changed
            "difference": {"mean": float(differences.mean()), "max": float(differences.max()), "tokens": len(differences)},
            # Taken before the additional measurements; with CUDA, of torch's tensors.
            "peak": torch.cuda.max_memory_allocated() if self.gate.cuda else resident_bytes()[1],
        }
        if not isinstance(self.engine, Sampler):
            found["update_all_s"] = self.watch.repeat(everything=True)
        self.generate_s, self.differences.seconds = generate_s, 0.0
        self.differences.found.clear()
        return found


def main() -> None:
    settings = Settings.from_arguments()
    workload, gate = settings.workload, Gate(settings)
    asked = json.loads((settings.folder / "engines.json").read_text())
    engine: RolloutEngine = Sampler(max_new_tokens=workload.max_new_tokens)
    if settings.side == "vllm":
        engine = VLLMSampler(max_new_tokens=workload.max_new_tokens, max_model_len=asked["context"])
    elif settings.side == "server":
        engine = VLLMServerSampler(urls=[asked["url"]], max_new_tokens=workload.max_new_tokens)
    policy, timer, differences = build_policy(settings, sampler=engine), StepTimer(), TimedDifferences()
    # Random scores need no rollouts, and all sides train the same modules.
    adapter = HybridAdapterSetup(budget=ModuleBudget(0.1), scorer=Random(), rank=workload.rank, alpha=workload.alpha)
    measured = Measured(gate, timer, policy.task.generation.sampler, differences)
    train(settings, policy, [timer, adapter, differences, measured])


if __name__ == "__main__":
    main()

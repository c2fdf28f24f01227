"""What both workers share: the settings they are given, the gate that holds them between steps, and their memory.

A worker is a process that does one step whenever the parent writes a line to it, and answers each with one line of JSON. While it
waits it is blocked on a pipe and uses no processor.
"""

import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from workloads import Workload


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know; made by the parent, as JSON."""

    workload: Workload
    folder: Path  # model, tokenizer and prompts.json, made by prepare.py
    device: str  # cpu or cuda
    threads: int
    rollouts: int  # at most; the parent may stop earlier
    seed: int
    side: str = ""  # which of the sides this worker is, where one script serves several
    overrides: dict[str, Any] = field(default_factory=dict)  # settings of TRL's GRPOConfig to try

    @staticmethod
    def from_arguments() -> "Settings":
        """Read the worker's only argument."""
        values = json.loads(sys.argv[1])
        return Settings(**{**values, "workload": Workload(**values["workload"]), "folder": Path(values["folder"])})

    @property
    def prompts(self) -> list[str]:
        """All prompts, those of the first rollout first."""
        texts: list[str] = json.loads((self.folder / "prompts.json").read_text())
        return texts


class Gate:
    """Lets one step through at a time and measures it.

    Args:
        device: `cpu` or `cuda`, whose queue is waited for before a time is taken.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.begin = self.begin_cpu = 0.0
        # Libraries print to the standard output: what is meant for the parent goes through a copy, the rest into the log.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, prompt_ids: Sequence[Sequence[int]], trainable: int, **details: Any) -> None:
        """Say that the model is loaded, and what will be trained on what."""
        self._answer(
            trainable_parameters=trainable,
            prompt_tokens=sorted({len(ids) for ids in prompt_ids}),
            prompt_digest=zlib.crc32(json.dumps([list(ids) for ids in prompt_ids]).encode()),
            device=torch.cuda.get_device_name() if self.cuda else "cpu",
            threads=torch.get_num_threads(),
            memory=self._memory(),
            **details,
        )

    def wait(self) -> bool:
        """Block until the parent wants a step; False if it wants no more."""
        wanted = sys.stdin.readline().strip() == "step"
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()
        return wanted

    def done(self, lengths: Sequence[int], optimizer_steps: int, **details: Any) -> None:
        """Report the step that `wait` let through.

        Args:
            lengths: Completion tokens of each row.
            optimizer_steps: Made since the start.
            details: What else to report.
        """
        if self.cuda:
            torch.cuda.synchronize()
        self._answer(
            seconds=time.perf_counter() - self.begin,
            processor_seconds=time.process_time() - self.begin_cpu,  # of all threads: less disturbed by other processes
            lengths=list(lengths),
            optimizer_steps=optimizer_steps,
            memory=self._memory(),
            **details,
        )

    def _answer(self, **values: Any) -> None:
        print(json.dumps(values), file=self.answers, flush=True)

    def _memory(self) -> dict[str, int]:
        """Bytes: `cpu` now, its peak, and the same of the GPU's tensors."""
        memory = host_memory()
        if self.cuda:
            memory |= {
                "cuda": torch.cuda.memory_allocated(),
                "cuda_peak": torch.cuda.max_memory_allocated(),
                "cuda_reserved_peak": torch.cuda.max_memory_reserved(),
            }
        return memory


def host_memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most.

    On Linux from /proc: the peak that `getrusage` gives would include that of the parent before this program was started.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"cpu": peak, "cpu_peak": peak}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {"cpu": int(fields["VmRSS"].split()[0]) * 1024, "cpu_peak": int(fields["VmHWM"].split()[0]) * 1024}

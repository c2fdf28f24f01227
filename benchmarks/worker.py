"""The gate at which workers wait between steps.

A worker is a process that does one step for each line from the parent, and answers each with one line of JSON. While it waits, it
is blocked on a pipe and uses no processor.
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.processes import resident_bytes
from benchmarks.workloads import Settings


class Gate:
    """Lets one step through at a time and measures it."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.cuda = settings.device == "cuda"
        self.begin = self.begin_cpu = 0.0
        # Libraries print to the standard output: what is meant for the parent goes through a copy, the rest into the log.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, prompt_ids: Sequence[Sequence[int]], trainable: int, **details: Any) -> None:
        """Report that the model is loaded, with the trained parameters and the data."""
        self._answer(
            trainable_parameters=trainable,
            prompt_tokens=sorted({len(ids) for ids in prompt_ids}),
            prompt_digest=zlib.crc32(json.dumps([list(ids) for ids in prompt_ids]).encode()),
            device=torch.cuda.get_device_name() if self.cuda else "cpu",
            threads=torch.get_num_threads(),
            **details,
        )

    def wait(self) -> bool:
        """Block until the parent wants a step; False if it wants no more."""
        wanted = sys.stdin.readline().strip() == "step"
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()
        return wanted

    def done(self, lengths: Sequence[int], optimizer_steps: int, **details: Any) -> None:
        """Report the step that `wait` let through: tokens of each completion, optimizer steps since the start, details."""
        if self.cuda:
            torch.cuda.synchronize()
        self._answer(
            seconds=time.perf_counter() - self.begin,
            processor_seconds=time.process_time() - self.begin_cpu,  # of all threads: less disturbed by other processes
            lengths=list(lengths),
            optimizer_steps=optimizer_steps,
            **details,
        )

    def _answer(self, **values: Any) -> None:
        """Answer with the bytes of this process: `cpu` now, its peak, and the same for the GPU's tensors."""
        now, peak = resident_bytes()
        memory = {"cpu": now, "cpu_peak": peak}
        if self.cuda:
            memory |= {"cuda": torch.cuda.memory_allocated(), "cuda_peak": torch.cuda.max_memory_allocated()}
        print(json.dumps({**values, "memory": memory}), file=self.answers, flush=True)

"""A benchmark's own vLLM server, started on a free port, and ended with all its processes."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.commands import BenchmarkError, environment, last_line
from benchmarks.processes import Family

START_S = 600.0  # that a server may take to be ready
END_S = 30.0  # and to end
CACHE_GIB = 1  # KV cache on a CPU; by default vLLM takes a share of the machine's memory
BATCHED_TOKENS = 8192  # of prompts in one pass on a CPU; at least the longest prompt with completion
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # allows changing its weights
    "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),  # only here: elsewhere it would also apply to engines in process
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def serving(folder: Path, dtype: str, device: str, threads: int, context: int | None, log: Path) -> Iterator[tuple[str, Family]]:
    """Context with a running server: its URL and its processes; its output is in `log`.

    Prompts with completions have at most `context` tokens; None for the model's limit.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    family, url = Family(), f"http://127.0.0.1:{port}"
    variables = {**environment(threads), **_ENVIRONMENT, **family.environment}
    with log.open("w") as file:
        streams: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command(folder, dtype, device, port, context), env=variables, **streams)
    try:
        wait(process, url, log)
        yield url, family
    finally:
        process.terminate()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        family.kill()


def wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until the server is ready."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise BenchmarkError(f"the vLLM server ended while it started: {last_line(log)} (its log is {log})")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:  # URLError is one
            time.sleep(0.5)
    raise BenchmarkError(f"the vLLM server was not ready after {START_S:.0f} s (its output is in {log})")


def command(folder: Path, dtype: str, device: str, port: int, context: int | None) -> list[str]:
    """The command that starts it; docs/how-to/vllm.md explains the options."""
    backend = "nccl" if device == "cuda" else "hybrid_lightning"
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--enable-scale-out", "--generation-config", "vllm"]
    arguments += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", f'{{"backend": "{backend}"}}']
    arguments += ["--max-model-len", str(context)] if context else []
    if device == "cuda":
        return [*arguments, "--gpu-memory-utilization", "0.3"]  # as in process
    # The same number of sequences as in process. Prompts are never cut into chunks: on a CPU vLLM 0.32 fails with "CPU Generator
    # does not use offset" when it postpones the rest of a prompt of a request with a seed.
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(context or 0, BATCHED_TOKENS))]
    return [*arguments, "--enforce-eager", "--max-num-seqs", "128", *whole]

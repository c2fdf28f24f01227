"""Commands that ask a hub, each forked from a process that has imported everything: libraries read only once which hub that is.

As a program it reads a command a line from standard input, as JSON, and answers each with a line.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from cli_runs import Result, run
from fork_server import IMPORTED, free_port


class Commands:
    """A process that runs commands in a folder, behind an endpoint, with caches in another folder.

    Args:
        endpoint: Of the hub.
        home: The caches.
        folder: To run in.
        **more: Of the environment, such as HF_HUB_OFFLINE.
    """

    def __init__(self, endpoint: str, home: Path, folder: Path, **more: str) -> None:
        self.folder = folder
        log = folder / "log.txt"  # of what goes around `sys.stderr`, such as Lightning's logging
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**environment(endpoint, home), **more},
        )

        self._log = log.open()

    def __call__(self, *arguments: Any, token: str = "", ranks: int = 1) -> Result:
        """Run a command, logged in by a token or not at all; on several ranks what the first one says and the highest code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"folder": str(self.folder), "arguments": [str(argument) for argument in arguments], "environment": {}}
        if token:
            asked["environment"] = {"HF_TOKEN": token}
        asked["ranks"] = [{}]
        if ranks > 1:  # as torchrun starts them
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
            asked["ranks"] = [{**shared, "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that runs the commands has ended: {self.log()}"
        return Result(**json.loads(answer))

    def log(self) -> str:
        """What was logged since this was asked last."""
        return self._log.read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """Of a process behind an endpoint, with its caches in a folder, as of a user who has never logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    caches = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **caches, "NO_PROXY": "*", "PYTHONPATH": os.pathsep.join(sys.path)}


def _serve() -> None:
    for name in (*IMPORTED, "datasets", "fsspec.implementations.http", "transformers.models.qwen3.modeling_qwen3"):
        import_module(name)
    gc.freeze()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        results = [_started(asked, {**asked["environment"], **rank}) for rank in asked["ranks"]]
        results = [_result(*started) for started in results]
        code = max(result["code"] for result in results)
        answers.write(json.dumps({**results[0], "code": code}) + "\n")
        answers.flush()
    os._exit(0)  # Python would take all modules apart


def _started(asked: dict[str, Any], environment: dict[str, str]) -> tuple[int, int]:
    """A process that runs a command, and where it writes its result."""
    end, written = os.pipe()
    process = os.fork()
    if process:
        os.close(written)
        return process, end
    os.close(end)
    os.environ.update(environment)
    try:
        result = run(asked["folder"], *asked["arguments"])
    except BaseException as error:  # what a command line must never let out
        result = Result(70, "", "".join(traceback.format_exception(error)))
    with os.fdopen(written, "w") as file:
        file.write(json.dumps(vars(result)))
    sys.stderr.flush()
    os._exit(0)


def _result(process: int, end: int) -> dict[str, Any]:
    with os.fdopen(end) as file:
        text = file.read()
    _, status = os.waitpid(process, 0)
    return json.loads(text) if text else {"code": 70, "out": "", "err": f"the process ended with status {status}"}


if __name__ == "__main__":
    _serve()

"""Commands that ask a hub, one after the other in a process of their own: libraries read only once which hub that is.

As a program it reads a command a line from standard input, as JSON, and answers each with a line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cli_runs import Result, run

from hybrid_lightning import hub


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

    def __call__(self, *arguments: Any, token: str = "") -> Result:
        """Run a command, logged in by a token or not at all."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"folder": str(self.folder), "arguments": [str(argument) for argument in arguments], "token": token}
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
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if asked["token"]:
            os.environ["HF_TOKEN"] = asked["token"]
        hub.hub_answers.cache_clear()  # each command is a process of its own to a user
        try:
            result = run(asked["folder"], *asked["arguments"])
        except BaseException as error:  # what a command line must never let out
            import traceback

            result = Result(70, "", "".join(traceback.format_exception(error)))
        answers.write(json.dumps(vars(result)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

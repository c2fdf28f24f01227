"""Other systems, by simulation: a process that lacks what macOS and Windows lack. No run on them is replaced by that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config",
    str(ROOT / "configs" / "gspo.yaml"),
    *("--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.validation_prompts=4"),
    *(
        "--model.prompts_per_rollout=4",
        "--model.samples_per_prompt=4",
        "--adapter.calibration_prompts=4",
        "--model.eval_samples=2",
        "--checkpoint.monitor=null",
    ),
]
# What a run imports of other libraries: these look at the system when they are imported, and are those of this one.
RUN = """
import json, sys
from hybrid_lightning.cli import main
sys.argv[1:] = json.loads(sys.argv[1])
main()
print(json.dumps(sorted(name for name in sys.modules if not name.startswith(("hybrid_lightning", "__main__")))), file=sys.stderr)
"""
SIMULATED = """
import contextlib, ctypes, importlib, json, os, platform, select, signal, sys
system, libraries, commands = json.loads(sys.stdin.read())
for name in libraries:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
class CDLL(ctypes.CDLL):
    def __init__(self, name, *given, **named):
        if name is None and system == "win32":
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *given, **named)
LINUX = {os: ["sched_getaffinity", "pidfd_open", "memfd_create", "O_PATH", "posix_fadvise", "unshare"], signal: ["sigtimedwait"]}
UNIX = {
    os: [*LINUX[os], "fork", "killpg", "setsid", "getuid", "geteuid", "WNOHANG", "sysconf", "uname", "O_CLOEXEC", "pread"],
    signal: ["SIGKILL", "SIGUSR1", "SIGHUP", "SIGCHLD", "SIGPROF", "setitimer", "pthread_sigmask", "sigtimedwait"],
    select: ["poll", "epoll"],
}
for module, names in (UNIX if system == "win32" else LINUX).items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
if system == "win32":
    of_windows = {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
    signal.valid_signals = lambda: of_windows
for name in ("fcntl", "resource", "pwd", "grp", "termios") if system == "win32" else ():
    sys.modules[name] = None
ctypes.CDLL, sys.platform = CDLL, system
from lightning.pytorch.trainer.connectors import signal_connector
signal_connector._IS_WINDOWS = system == "win32"
platform.system = lambda: {"darwin": "Darwin", "win32": "Windows"}[system]
assert not any(name.startswith("hybrid_lightning") for name in sys.modules)
from hybrid_lightning.cli import main
for number, command in enumerate(commands):
    print(f"== {number}", flush=True)
    sys.argv = ["hybrid_lightning", *command]
    try:
        main()
    except SystemExit as ended:
        print(f"exit {ended.code}", flush=True)
print(f"== {len(commands)}", flush=True)
from hybrid_lightning.__main__ import run
sys.argv = ["hybrid_lightning", "fit", *json.loads(os.environ["SMALL"])]
run()
"""
COMMANDS = [
    ["--help"],
    ["plan", *SMALL],
    ["fit", *SMALL, "--model.reward=CodeTests"],
    ["fit", *SMALL, "--model.reward=MathMatch"],
]


def process(code, folder, *arguments, text=None):
    environment = {**os.environ, "SMALL": json.dumps(SMALL), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, input=text, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    done = process(RUN, tmp_path_factory.mktemp("here"), json.dumps(["fit", *SMALL]))
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_a_run_on_another_system(system, libraries, tmp_path):
    done = process(SIMULATED, tmp_path, text=json.dumps([system, libraries, COMMANDS]))
    assert done.returncode == 0, done.stderr[-3000:]
    said = [part.partition("\n")[2] for part in done.stdout.split("== ")[1:]]
    assert said[0].endswith("exit 0\n") and "takes up to" in said[1]
    assert said[2] == "exit 1\n" and "the sandbox needs Linux" in done.stderr
    assert said[3].endswith("exit 1\n") == (system == "win32") == ("MathMatch needs Linux or macOS" in done.stderr)
    assert "Verdict: " in said[4] and (tmp_path / "runs" / "gspo" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    (engine,) = {line for line in done.stderr.splitlines() if line.startswith("engine: ")}
    assert f"the compiled ones are for Linux, and this is {system}" in engine

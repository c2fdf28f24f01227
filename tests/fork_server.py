"""Processes forked from one that has imported everything, which takes longer than a tiny training run.

`Forked` is a `subprocess.Popen` that forks commands of this Python: the process has the arguments, environment, folder, streams
and handlers of signals that a fresh one would have, and runs the same file, module or code, but that pictures of plans are empty.
What is about the start itself needs a fresh process: when modules are imported, and what libraries read from the environment as
they are.
"""

import atexit
import fcntl
import gc
import inspect
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import current_process, forkserver, get_context
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from hybrid_lightning.process import _SPINS

_context = get_context("forkserver")
# With what is imported only as a run needs it, and the helpers of tests.
IMPORTED = ["hybrid_lightning.cli.main", "hybrid_lightning.adapters.apply", "hybrid_lightning.export"]
IMPORTED += ["hybrid_lightning.sharding.fsdp2", "torch.utils.serialization", "attrs"]
IMPORTED += ["transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb"]
IMPORTED += ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.algorithms.ddp_comm_hooks"]
IMPORTED += ["torch.utils.tensorboard", "rich._emoji_codes", "matplotlib.backends.backend_agg", "pytest"]
IMPORTED += ["tiny_runs", "tiny_examples", "cli_runs", "stopped_runs"]
IMPORTED += ["vllm.entrypoints.llm"] if find_spec("vllm") else []
_context.set_forkserver_preload(IMPORTED)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)
_Popen, _getppid = subprocess.Popen, os.getppid
_SHARED = "HYBRID_LIGHTNING_TESTS_FORK_SERVER"  # address of a server that several processes use


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_shared() -> None:
    """Start a server from which the workers of pytest fork, and what they start: they end before this process.

    What its processes print without being asked for is lost, as it would be if a test had started it.
    """
    kept = {end: os.dup(end) for end in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for end in kept:
            os.dup2(nowhere, end)
        _ensure_running()
    finally:
        for end, copy in kept.items():
            os.dup2(copy, end)
            os.close(copy)
        os.close(nowhere)
    os.environ[_SHARED] = forkserver._forkserver._forkserver_address
    subprocess.Popen = Forked  # which pytest-xdist calls


def become_worker() -> None:
    """Let a worker of pytest start processes as ever, and know its parent."""
    subprocess.Popen, os.getppid = _Popen, _getppid


def _ensure_running() -> None:
    server = forkserver._forkserver
    if _SHARED in os.environ and server._forkserver_address is None:
        server._forkserver_address, server._forkserver_alive_fd = os.environ[_SHARED], os.open(os.devnull, os.O_RDONLY)
        server.ensure_running = lambda: None
    paths = os.pathsep.join(path for path in sys.path if path)  # of the helpers
    with patch.dict(os.environ, PYTHONPATH=paths, GOMP_SPINCOUNT=_SPINS):
        server.ensure_running()


def forked(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that calls a function.

    Threads of all these processes wait as under `python -m hybrid_lightning`: OpenMP's own way is slow on a busy machine.
    """
    _ensure_running()
    process = _context.Process(target=_begin, args=(os.environ.get("PYTHONPATH"), target, arguments), daemon=True)
    process.start()
    return process


def _begin(paths: str | None, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if paths is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = paths
    from cli_runs import empty_picture

    from hybrid_lightning.callbacks import hybrid_adapter_setup

    gc.freeze()  # the collector skips the server's imports, so their pages are not copied
    hybrid_adapter_setup.draw_heatmap = empty_picture  # as in the tests' own process: half of the time of a tiny run
    target(*arguments)


class _Stream:
    """An open file that goes to the process that is being started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _same, (DupFd(self.number),)  # has to be made while it starts


def _same(value: Any) -> Any:
    return value


class Forked(subprocess.Popen):
    """Forks for `[sys.executable, ...]` with a file, `-m` and a module or `-c` and code; any other command starts as ever."""

    _process: Any = None

    def _execute_child(self, *arguments: Any, **options: Any) -> None:
        given = _SIGNATURE.bind(self, *arguments, **options).arguments
        python, *command = map(os.fspath, given["args"])
        command = command[command[:1] == ["-u"] :]
        if python != sys.executable or (command[0].startswith("-") and command[0] not in ("-m", "-c")):
            return super()._execute_child(*arguments, **options)
        assert not (given["shell"] or given["preexec_fn"] or given["executable"])
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        ends = {number: number if end == -1 else end for number, end in enumerate(ends)}  # this process's own if none is given
        streams = {number: _Stream(end) for number, end in (ends | {end: end for end in given["pass_fds"]}).items()}
        environment = dict(os.environ if given["env"] is None else given["env"])
        folder = os.getcwd() if given["cwd"] is None else os.fspath(given["cwd"])
        ignored = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_IGN]  # which a new process inherits
        self._process = forked(_run, command, environment, folder, streams, given["start_new_session"], os.getpid(), ignored)
        self.pid = self._process.pid
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)
        self._process.join(timeout)
        if self._internal_poll() is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`, in a forked process."""
    with patch.object(subprocess, "Popen", Forked):
        return subprocess.run(command, **options)


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    streams: Mapping[int, Any],
    new_session: bool,
    parent: int,
    ignored: Sequence[int],
) -> None:
    """Become the process that was asked for."""
    os.getppid = lambda: parent if os.path.exists(f"/proc/{parent}") else 1
    ends = {}
    for number, stream in streams.items():
        end = stream.detach()
        ends[number] = fcntl.fcntl(end, fcntl.F_DUPFD, 256)  # out of the way of the ones below
        os.close(end)
    for number, end in ends.items():
        os.dup2(end, number)
        os.close(end)
    # Whoever puts other objects in their place keeps the files.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    current_process()._config["daemon"] = False  # may have processes of its own
    if new_session:
        os.setsid()
    for number in _SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else default)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:  # read when torch was imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    name, *arguments = command
    code = 0
    try:
        subprocess.Popen = Forked  # for what it starts, by the same server
        forkserver._forkserver.ensure_running = lambda: None
        if name in ("-m", "-c"):
            sys.path.insert(0, folder)
            sys.argv = [name, *arguments[1:]]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True) if name == "-m" else _run_code(arguments[0])
        else:
            sys.path.insert(0, str(Path(name).parent))
            sys.argv = [name, *arguments]
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run_code(code: str) -> None:
    sys.modules["__main__"] = module = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(module))

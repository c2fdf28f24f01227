"""Hostile programs: none gets out, learns anything, harms anyone or leaves anything behind."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from escapes import ENDLESS, FILES, NETWORK, PROCESSES, RESOURCES, SYSTEM_CALLS
from hostile_host import in_one, results, whole

from hybrid_lightning.sandbox.isolation import require_isolation
from hybrid_lightning.sandbox.limits import Limits
from hybrid_lightning.sandbox.programs import Settings, StandardStreamTests, run_programs

ROOT = Path(__file__).parents[2]
X86 = platform.machine() == "x86_64"
ATTEMPTS = {**FILES, **NETWORK, **PROCESSES, **(SYSTEM_CALLS if X86 else {})}
ENDED = StandardStreamTests((("", "escaped"),))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All of them, run at once, and what became of the host."""
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    mechanisms = require_isolation().mechanisms
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(["sleep", "1000"]) as victim,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        patch.setenv("SANDBOX_SECRET", "secret")
        local.bind(str(folder / "socket"))
        local.listen()
        (folder / "socket").chmod(0o777)
        names = {"secret": secret, "folder": folder, "socket": folder / "socket", "pid": os.getpid(), "victim": victim.pid}
        names["port"] = server.getsockname()[1]
        before = secret.stat()
        held = results(in_one(ATTEMPTS, names), mechanisms)
        programs = {name: whole(body) for name, body in {**RESOURCES, **ENDLESS}.items()}
        # More at a time than processors: some only wait.
        limits = Limits(cpu_seconds=1, wall_seconds=3, memory_bytes=192 * 2**20)
        outcomes = run_programs([(source, ENDED) for source in programs.values()], Settings(mechanisms, limits), workers=6)
        server.settimeout(0)
        try:
            connected = server.accept()
        except BlockingIOError:
            connected = None
        yield SimpleNamespace(
            held=held,
            outcomes=dict(zip(programs, outcomes, strict=True)),
            connected=connected,
            secret=secret,
            folder=folder,
            before=before,
            victim=victim,
        )
        victim.kill()


def test_they_are_many(run):
    assert len(ATTEMPTS) + len(RESOURCES) + len(ENDLESS) > 100


@pytest.mark.parametrize("name", ATTEMPTS)
def test_it_is_held(run, name):
    assert run.held[name] == "held"


@pytest.mark.parametrize("name", RESOURCES)
def test_it_gets_no_more_than_it_may(run, name):
    """It ran to its end and said itself that it was held."""
    expected = "ended with an error: OSError: [Errno 27] File too large" if name == "much output" else "another output"
    assert run.outcomes[name].passed == 0 and run.outcomes[name].reason == expected


@pytest.mark.parametrize("name", ENDLESS)
def test_it_is_ended(run, name):
    outcome = run.outcomes[name]
    assert outcome.passed == 0 and outcome.reason.startswith(("out of CPU time", "ended by signal", "not done after")), outcome


def test_the_host_is_as_it_was(run):
    assert run.secret.read_text() == "secret" and sorted(path.name for path in run.folder.iterdir()) == ["secret", "socket"]
    now = run.secret.stat()
    assert (now.st_mode, now.st_mtime, now.st_uid) == (run.before.st_mode, run.before.st_mtime, run.before.st_uid)
    assert run.victim.poll() is None and os.sched_getaffinity(run.victim.pid) == os.sched_getaffinity(0)
    assert run.connected is None


def children():
    return subprocess.run(["ps", "-ewwo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout


def running(parent):
    """Processes of programs that may run for long, started by a process."""
    marks = f'"parent": {parent}', '"wall_seconds": 1000'
    return [line for line in children().splitlines() if all(mark in line for mark in marks)]


def test_nothing_is_left_behind(run):
    assert "hybrid_lightning.sandbox.launcher" not in children()
    zombies = [
        line for line in children().splitlines() if line.split()[2].startswith("Z") and line.split()[1] == str(os.getpid())
    ]
    assert not zombies


@pytest.mark.parametrize("mechanisms", ["namespaces,landlock,seccomp", "namespaces,seccomp", "landlock,seccomp"])
def test_each_way_holds_without_root(mechanisms, tmp_path):
    """In a process of another user, where this one is root; by a Python that the other user may read."""
    python, prefix = sys.executable, []
    if os.geteuid() == 0:
        python = next(
            (found for name in ("python3.13", "python3.12", "python3.11") if (found := shutil.which(name, path="/usr/bin"))), None
        )
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if python is None or shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, and a Python of the system in /usr/bin")
    tmp_path.chmod(0o777)
    source = tmp_path / "source"
    for part in ("hybrid_lightning/__init__.py", "hybrid_lightning/errors.py", "hybrid_lightning/sandbox", "tests/sandbox"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, source / part)
    for folder in tmp_path.parents:
        if folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(folder.stat().st_mode | 0o055)  # the way there
    command = [*prefix, python, "-B", str(source / "tests/sandbox/hostile_host.py"), mechanisms, str(tmp_path)]
    done = subprocess.run(command, env={"PYTHONPATH": str(source)}, capture_output=True, text=True, timeout=60, check=False)
    if "Permission denied" in done.stderr and "can't open file" in done.stderr:
        pytest.skip(f"another user cannot read {tmp_path}")
    assert done.stdout.strip().splitlines()[-1:] == ["all held"], done.stdout + done.stderr


def test_programs_die_with_the_one_who_started_them():
    code = (
        "from hybrid_lightning.sandbox.isolation import require_isolation\n"
        "from hybrid_lightning.sandbox.limits import Limits\n"
        "from hybrid_lightning.sandbox.programs import Settings, StandardStreamTests, run_programs\n"
        "run_programs([('import time; time.sleep(1000)', StandardStreamTests((('', ''),)))], "
        "Settings(require_isolation().mechanisms, Limits(wall_seconds=1000)), 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            deadline = time.monotonic() + 30
            while len(running(process.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(running(process.pid)) == 3  # the launcher, the one who waits, the program
        finally:
            process.kill()
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(process.pid)

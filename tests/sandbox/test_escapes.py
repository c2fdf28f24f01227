"""Hostile programs: none gets out, learns anything, harms anyone or leaves anything behind."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from escapes import ENDLESS, FILES, NETWORK, PACKAGES, PROCESSES, RESOURCES, SYSTEM_CALLS
from hostile_host import in_one, lend, results, whole

from hybrid_lightning.sandbox import namespaces
from hybrid_lightning.sandbox.isolation import require_isolation
from hybrid_lightning.sandbox.launch import Limits
from hybrid_lightning.sandbox.programs import Settings, StandardStreamTests, run_programs

ROOT = Path(__file__).parents[2]
X86 = platform.machine() == "x86_64"
ATTEMPTS = {**FILES, **NETWORK, **PROCESSES, **(SYSTEM_CALLS if X86 else {})}
ENDED = StandardStreamTests((("", "escaped"),))


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What programs could do harm to: a file that anyone may change, a process, and what listens."""
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    monkeypatch.setenv("SANDBOX_SECRET", "secret")
    with (
        subprocess.Popen(["sleep", "1000"]) as victim,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(str(tmp_path / "socket"))
        local.listen()
        (tmp_path / "socket").chmod(0o777)
        server.settimeout(0)
        yield SimpleNamespace(folder=tmp_path, secret=secret, victim=victim, server=server, local=tmp_path / "socket")
        victim.kill()


def test_none_gets_out_or_harms_the_host(host):
    names = {"secret": host.secret, "folder": host.folder, "home": Path.home(), "socket": host.local}
    names |= {"pid": os.getpid(), "victim": host.victim.pid}
    before = host.secret.stat()
    held = results(in_one(ATTEMPTS, {**names, "port": host.server.getsockname()[1]}), require_isolation().mechanisms)
    assert held == dict.fromkeys(ATTEMPTS, "held") and len(ATTEMPTS) > 80
    now = host.secret.stat()
    assert host.secret.read_text() == "secret" and sorted(path.name for path in host.folder.iterdir()) == ["secret", "socket"]
    assert (now.st_mode, now.st_mtime, now.st_uid) == (before.st_mode, before.st_mtime, before.st_uid)
    assert host.victim.poll() is None and os.sched_getaffinity(host.victim.pid) == os.sched_getaffinity(0)
    with pytest.raises(BlockingIOError):  # nobody has connected
        host.server.accept()


def reasons(programs, workers, limits):
    """Name of a program -> why it earns nothing."""
    settings = Settings(require_isolation().mechanisms, limits)
    outcomes = run_programs([(whole(body), ENDED) for body in programs.values()], settings, workers)
    assert not any(outcome.passed for outcome in outcomes)
    return {name: outcome.reason for name, outcome in zip(programs, outcomes, strict=True)}


def test_none_gets_more_than_it_may():
    """Each runs to its end and reports that it was held, except one that can no longer report."""
    said = reasons(RESOURCES, 2, Limits(3, 30.0, memory_bytes=192 * 2**20))
    assert said.pop("much output") == "ended with an error: OSError: [Errno 27] File too large"
    assert said == dict.fromkeys(said, "wrong output")


def test_all_are_ended_and_nothing_is_left_behind():
    said = reasons(ENDLESS, 6, Limits(1, 2.0, memory_bytes=192 * 2**20))  # more at a time than processors: some only wait
    ends = ("out of CPU time", "ended by signal", "not done after")
    assert all(reason.startswith(ends) for reason in said.values()), said
    assert f'"parent": {os.getpid()},' not in children()
    zombies = [line for line in children().splitlines() if line.split()[2][0] == "Z" and line.split()[1] == str(os.getpid())]
    assert not zombies


def children():
    """A line for each process: its number, its parent's, its state and its command."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that has just ended
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines.append(f"{folder.name} {parent} {state} {' '.join(command.split())}")
    return "\n".join(lines)


def running(parent):
    """Processes of programs that may run for long, started by a process."""
    marks = f'"parent": {parent}', '"wall_seconds": 1000'
    return [line for line in children().splitlines() if all(mark in line for mark in marks)]


@contextmanager
def folder_below(parent):
    """A folder that any user may enter, and another one beside it."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="beside_"), tempfile.TemporaryDirectory(dir=parent) as name:
        Path(name).chmod(0o755)
        yield Path(name)


# Each with a folder below which programs may import.
FOLDERS = (namespaces.TEMPORARY, "/dev/shm", namespaces.TEMPORARY)
WAYS = dict(zip(("namespaces,landlock,seccomp", "namespaces,seccomp", "landlock,seccomp"), FOLDERS, strict=True))


def test_each_way_holds_without_root():
    """In a process of another user, where this one is root; by a Python that the other user may read.

    The clone and an environment lie below the temporary folder. Programs see a temporary folder of their own in its place.
    """
    python, prefix = sys.executable, []
    if os.geteuid() == 0:
        found = (shutil.which(f"python3.{minor}", path="/usr/bin") for minor in (13, 12, 11))
        python = next(filter(None, found), None)
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if python is None or shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, and a Python of the system in /usr/bin")
    with folder_below(namespaces.TEMPORARY) as folder:  # which, other than pytest's folders, others may enter
        for part in (
            *(
                f"hybrid_lightning/{name}"
                for name in ("__init__.py", "__init__.pyi", "shared", "types.py", "errors.py", "sandbox")
            ),
            "tests/sandbox",
        ):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, folder / part)
        (folder / "host").mkdir()
        (folder / "host").chmod(0o777)
        subprocess.run([python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        (site,) = (folder / "venv/lib").glob("python*/site-packages")
        lend(site)
        script = [str(folder / "venv/bin/python"), "-B", str(folder / "tests/sandbox/hostile_host.py")]
        for mechanisms in WAYS:
            command = [*prefix, *script, mechanisms, str(folder / "host"), str(folder)]
            how = {"env": {"PYTHONPATH": str(folder)}, "capture_output": True, "text": True, "timeout": 60}
            done = subprocess.run(command, check=False, **how)
            assert done.stdout.strip().splitlines()[-1:] == ["all held"], (mechanisms, done.stdout + done.stderr)


HONEST = "import alone, lent, parts.inner; assert parts.inner.double(21) == lent.double(21) == 42 and alone.math"


@pytest.mark.parametrize(("mechanisms", "parent"), WAYS.items())
def test_packages_in_any_folder_can_be_imported_and_not_changed(mechanisms, parent):
    """By this very user, as root another one in the sandbox."""
    if not os.access(parent, os.W_OK):
        pytest.skip(f"needs {parent}")
    with folder_below(parent) as folder:
        site = folder / "a/b/c/site"
        site.mkdir(parents=True)
        (folder / "host").mkdir()
        (secret := folder / "host/secret").write_text("secret")
        package = lend(site)
        (site / "alone.py").write_text("import math")
        (site / "parts/inner").mkdir(parents=True)  # a package without __init__
        (site / "parts/inner/__init__.py").write_text("from lent import double")
        before = {path: path.read_bytes() for path in site.rglob("*.py")}
        names = {"package": package, "above": folder, "secret": secret}
        held = results(
            in_one({**PACKAGES, "honest": HONEST}, names),
            mechanisms.split(","),
            [str(package), str(site / "alone.py"), str(site / "parts")],
        )
        assert held == {**dict.fromkeys(PACKAGES, "held"), "honest": "escaped"}
        assert {path: path.read_bytes() for path in site.rglob("*.py")} == before
        assert sorted(path.name for path in package.iterdir() if path.name != "__pycache__") == ["__init__.py"]


def test_programs_die_with_the_one_who_started_them():
    code = (
        "from hybrid_lightning.sandbox.isolation import require_isolation\n"
        "from hybrid_lightning.sandbox.launch import Limits\n"
        "from hybrid_lightning.sandbox.programs import Settings, StandardStreamTests, run_programs\n"
        "run_programs([('import time; time.sleep(1000)', StandardStreamTests((('', ''),)))], "
        "Settings(require_isolation().mechanisms, Limits(wall_seconds=1000)), 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            deadline = time.monotonic() + 100
            while len(running(process.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(running(process.pid)) == 3  # the launcher, the one who waits, the program
        finally:
            process.kill()
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(process.pid)

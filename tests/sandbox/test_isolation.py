"""Where programs cannot be isolated, an error says so at once, with what is missing and a remedy."""

import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

from hybrid_lightning.errors import ConfigError, SandboxError
from hybrid_lightning.rewards import CodeTests
from hybrid_lightning.sandbox import isolation, seccomp
from hybrid_lightning.sandbox import launch as launch_module
from hybrid_lightning.sandbox.launch import Limits, launch, probe
from hybrid_lightning.sandbox.programs import CallTests, Settings, StandardStreamTests, run_programs

MECHANISMS = ("namespaces", "seccomp")


def script(source, mechanisms=MECHANISMS, limits=None):
    return launch([isolation.Box("script", {"setup": "", "source": source})], mechanisms, limits or Limits())


def on_streams(source, text="", mechanisms=MECHANISMS, **options):
    """The result of a program that is to print its input."""
    (outcome,) = run_programs([(source, StandardStreamTests(((text, text),)))], Settings(mechanisms, **options), 1)
    return outcome


@pytest.fixture
def without(monkeypatch):
    """Makes mechanisms fail."""

    def fail(*names):
        reasons = {name: "OSError: not here" if name in names else "" for name in ("namespaces", "landlock", "seccomp")}
        monkeypatch.setattr(isolation, "probe", lambda: reasons)
        isolation._found.cache_clear()

    yield fail
    isolation._found.cache_clear()


@pytest.mark.parametrize("missing", [("seccomp",), ("namespaces", "landlock")])
def test_it_refuses_what_is_not_enough(without, missing):
    without(*missing)
    said = f"{missing[0]}: OSError: not here.*user namespaces.*Landlock.*allow_without_isolation"
    with pytest.raises(SandboxError, match=said):
        CodeTests()


def test_it_runs_with_what_there_is_only_if_told_so(without):
    without("seccomp")
    mechanisms = isolation.require_isolation(allow_without_isolation=True).mechanisms
    assert mechanisms == ("namespaces", "landlock") and on_streams("print(input())", "6", mechanisms).share == 1.0
    without("landlock")
    assert set(isolation.require_isolation().mechanisms) == {"namespaces", "seccomp"}, "which is enough"


def test_a_sandbox_that_does_not_hold_is_found_out(without, monkeypatch):
    """The attempts run by the same calls as programs: without a filter of system calls some of them succeed."""
    without("seccomp")
    monkeypatch.setattr(isolation.Isolation, "is_enough", True)
    with pytest.raises(SandboxError, match="is not secure on this machine: a program succeeded in making a process"):
        isolation.require_isolation()


def test_a_sandbox_in_which_no_program_runs_is_found_out(monkeypatch):
    monkeypatch.setattr(isolation, "_ATTEMPTS", "import no_such_module_{secret!r:.0}")
    isolation._try.cache_clear()
    with pytest.raises(SandboxError, match=r"no program runs in the sandbox of .*no_such_module"):
        isolation.require_isolation()


ROOT = Path(isolation.__file__).parents[2]
IS_ENOUGH = "from hybrid_lightning.sandbox.isolation import require_isolation; print(require_isolation().is_enough)"


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=["container", "umask"])
def test_root_of_a_container_that_knows_no_other_user_can_isolate_and_whoever_has_any_umask(umask):
    """Where root starts it, a program is another user, who has to get through the folders made on the way to what is kept."""
    alone = ["unshare", "--user", "--map-root-user"] if umask == 0o022 else []
    if alone and (shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode):
        pytest.skip("needs unshare, and user namespaces")
    command = [*alone, sys.executable, "-B", "-c", f"import os; os.umask({umask}); {IS_ENOUGH}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_other_systems_and_machines_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxError, match="on Darwin: the sandbox needs Linux"):
        isolation.require_isolation(allow_without_isolation=True)
    with pytest.raises(OSError, match="no table of system calls for machine type riscv64"):
        seccomp.build("riscv64", 1, True)
    assert len(seccomp.build("aarch64", 1, True)) % 8 == 0


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(launch_module, "_PAUSE_S", 0.0)


def test_what_fails_once_is_tried_again(monkeypatch, no_pause):
    start = Mock(side_effect=[SandboxError("short of memory"), DEFAULT], wraps=launch_module._start)
    monkeypatch.setattr(launch_module, "_start", start)
    assert on_streams("print(input())", "1").share == 1.0 and start.call_count == 2


SAID = r"'\x1b]0;title\x07 \x1b[31m\u202e red'"


def test_a_program_neither_passes_an_exit_code_for_one_of_ours_nor_controls_a_terminal():
    for code in (124, 125, 137):
        ran = script(f"import os; os._exit({code})")
        assert ran.in_time and ran.endings == {"script": "ended with an error"}
    source = f"import sys\nsys.stderr.write({SAID})\nsys.exit(1)"
    raises = CallTests(("assert f() == 1",), names=("f",)).run(f"def f(): raise ValueError({SAID})", Settings(MECHANISMS))
    for reason in (on_streams(source).reason, raises.reason):
        assert reason.isprintable() and "\\x1b[31m\\u202e red" in reason


_WITHOUT_ANYTHING = """
import ctypes, os, time
print(open("/proc/self/oom_score_adj").read().strip(), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(1000)
    os._exit(0)
time.sleep(0.3)
"""


def test_what_holds_without_isolation():
    """The first to go when memory runs short, no core dump (PR_GET_DUMPABLE), and even a daemon is found and ended."""
    started = time.monotonic()
    ran = script(_WITHOUT_ANYTHING, (), Limits(threads=10**5))
    assert ran.endings == {"script": ""} and time.monotonic() - started < 100, ran
    score, dumpable, daemon = ran.stdout.split()
    assert (score, dumpable) == (b"1000", b"0")
    assert not Path("/proc", daemon.decode()).exists()


def test_a_failed_start_is_not_a_failure_of_the_program(monkeypatch, no_pause):
    with monkeypatch.context() as patch, pytest.raises(SandboxError, match="cannot be set up: FileExistsError"):
        patch.setattr("hybrid_lightning.sandbox.launch.readable_files", lambda: ("/etc/ld.so.cache",) * 2)
        script("")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match=r"ended without a report \(exit code 1\)"):
        probe()
    with pytest.raises(SandboxError, match="ended without a report"):
        on_streams("")


def test_a_wrong_argument_is_refused():
    wrong = [("cpu_seconds", 1.5), ("memory_mb", 1), ("wall_seconds", math.inf), ("wall_seconds", math.nan), ("workers", 0)]
    for name, value in wrong:
        with pytest.raises(ConfigError, match=f"{name}={value}; give "):
            CodeTests(**{name: value})


def test_it_loads_little():
    """The launcher starts in some hundredths of a second; with `-S` there is nothing but the standard library."""
    for modules, heavy in [
        ("launcher", ("torch", "dataclasses", "subprocess")),
        ("isolation, hybrid_lightning.sandbox.programs", ("torch",)),
    ]:
        code = f"import hybrid_lightning.sandbox.{modules}, sys; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "[]\n", done.stderr

"""A process that is forked for a command of this Python is as a fresh one, and has what is slow to import."""

import os
import subprocess
import sys

import fork_server
import pytest

CODE = """
import os, signal, sys
handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
os.write(int(sys.argv[-1]), b"by a pipe")
print(os.getppid())
print(sys.argv, __name__, sys.modules["__main__"].CODE, os.getcwd(), dict(os.environ), [h.split(" at ")[0] for h in handlers])
print(sys.stdin.read(), sys.path[0], file=sys.stderr)
{end}
"""
CASES = [
    ("file", "import atexit; atexit.register(lambda: print('at last')); sys.exit('enough')"),
    ("-m", "sys.exit(3)"),
    ("-c", "sys.stdout.flush(); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGKILL)"),
]


@pytest.mark.parametrize(("kind", "end"), CASES)
def test_it_is_as_a_fresh_one(tmp_path, kind, end):
    code = f"CODE = {end!r}\n{CODE.format(end=end)}"
    (tmp_path / "there.py").write_text(code)
    command = {"file": [str(tmp_path / "there.py")], "-m": ["-m", "there"], "-c": ["-c", code]}[kind]
    reading, writing = os.pipe()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "WORD": "a word", "LC_CTYPE": "C.UTF-8"}
    options = {"cwd": tmp_path, "env": environment, "input": "from outside", "capture_output": True, "text": True, "check": False}
    command, options["pass_fds"] = [sys.executable, *command, "an argument", str(writing)], [writing]
    found = [start(command, **options) for start in (fork_server.run, subprocess.run)]
    assert os.read(reading, 100) == b"by a pipe" * 2
    os.close(reading)
    os.close(writing)
    forked, fresh = ((done.returncode, done.stdout, done.stderr.replace(f" {tmp_path}", " ")) for done in found)
    assert forked == fresh and "an argument" in fresh[1] and "from outside" in fresh[2]


def test_all_that_is_named_has_been_imported():
    """What has another name by now would be left out, without a word."""
    code = f"import sys; print([name for name in {fork_server.IMPORTED} if name not in sys.modules])"
    assert fork_server.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

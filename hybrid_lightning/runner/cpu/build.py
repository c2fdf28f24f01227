"""Compiles the CPU kernels for this processor, once, and loads them.

They are compiled on the user's machine, since only there the processor is known, and without torch's headers, so that it takes
seconds. The library is in the user's cache folder; a hash of everything it depends on is in its name.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# No option may let the compiler ignore nan: a gradient that is not finite has to be noticed.
_OPTIONS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# The order of a sum must not depend on the addresses of its numbers, which differ from run to run.
_OPTIONS += ["--param=vect-max-peeling-for-alignment=0"]
_OFF = "HYBRID_LIGHTNING_KERNELS"


class _CannotCompileError(Exception):
    """The kernels cannot be compiled; the message gives the cause and the remedy."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None.

    `HYBRID_LIGHTNING_KERNELS=0` in the environment turns them off. If they cannot be compiled, a warning gives the cause.
    """
    return _found()[0]


def why_none() -> str:
    """Why there are no kernels, worded for the user; empty where there are."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(_OFF) == "0":
        return None, f"{_OFF}=0 is set"
    if not sys.platform.startswith("linux"):
        return None, f"compiled kernels need Linux, and this is {sys.platform}"
    try:
        return _load(), ""
    except (_CannotCompileError, OSError) as error:
        logger.warning("no kernels for this CPU, so generation and training are slower: %s", error)
        return None, str(error)


def _load() -> ctypes.CDLL:
    compiler, runtime = _compiler(), _openmp()
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text(encoding="utf-8") for path in sources]
    digest = hashlib.sha256("\0".join([*texts, *_OPTIONS, *compiler, version, str(runtime), _processor()]).encode()).hexdigest()
    name = f"kernels-{digest[:16]}.so"
    with ExitStack() as stack:  # a loaded library no longer needs its file
        target = (_cache() or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / name
        if not target.exists():
            _compile(compiler, runtime, target)
        return ctypes.CDLL(str(target))


def _cache() -> Path | None:
    """The folder for compiled libraries; None if no folder is writable."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_lightning"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError if the user's home is unknown
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compiler() -> list[str]:
    """The compiler's command; CXX may set it, with options. It needs GCC's OpenMP interface, which Clang does not use."""
    named = os.environ.get("CXX", "").split()
    for candidate in [named] if named else [["g++"], ["c++"]]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    what = f"CXX={named[0]} was not found" if named else "no C++ compiler was found"
    raise _CannotCompileError(f"{what}; install one (Debian, Ubuntu: apt install g++), or set {_OFF}=0 to turn kernels off")


def _openmp() -> Path:
    """The OpenMP library that torch has loaded. With another one, two thread pools would compete for the same cores."""
    torch.get_num_threads()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise _CannotCompileError("this build of torch does not use OpenMP")


def _processor() -> str:
    """The processor's properties that -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "model\t", "cpu family", "flags", "Features", "CPU part")
    return "\n".join(
        [platform.machine(), *platform.libc_ver(), *dict.fromkeys(line for line in lines if line.startswith(wanted))]
    )


def _compile(compiler: list[str], runtime: Path, target: Path) -> None:
    from lightning.pytorch.utilities import rank_zero_info  # slow to import, and needed once

    rank_zero_info("compiling the CPU kernels, once: some seconds")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        result, objects = Path(folder) / target.name, [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [[*compiler, *_OPTIONS, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))  # raises the error of a command, if one fails
        # Without -fopenmp, which would link its own OpenMP library. -z defs reports missing symbols now instead of at load.
        _run([*compiler, "-shared", "-Wl,-z,defs", "-o", str(result), *objects, str(runtime)])
        result.replace(target)  # several processes may compile at once


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no output"])[0]
        raise _CannotCompileError(f"{command[0]} failed ({error}); set CXX to another compiler, or {_OFF}=0 to turn kernels off")

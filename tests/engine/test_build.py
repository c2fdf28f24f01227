"""Kernels are compiled once, and whoever cannot have them is told why and goes on without.

This folder is not named `kernels`: tests/ is on the path, and bitsandbytes asks for a package of that name.
"""

import os
import shutil
import sys

import fork_server
import pytest

from hybrid_lightning.engine.cpu.build import library

ASK = """
import torch
from hybrid_lightning.engine.cpu.operators import usable
print(usable(torch.zeros(1)))
"""
needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler")


def ask(cache, **variables):
    environment = {**os.environ, "HYBRID_LIGHTNING_KERNELS": "1", "XDG_CACHE_HOME": str(cache), **variables}
    done = fork_server.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, check=True, timeout=120)
    return done.stdout.strip(), done.stderr


@pytest.fixture
def quick(tmp_path):
    """A compiler that has compiled them before: that they compile is seen as this process loads its own."""
    path = tmp_path / "quick"
    copy = f'[ -z "$made" ] || cp {library()._name} "$made"'
    path.write_text(f'#!/bin/sh\nfor word; do [ "$before" = -o ] && made=$word; before=$word; done\n{copy}\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_they_are_compiled_once(tmp_path, quick):
    answer, said = ask(tmp_path, CXX=quick)
    assert answer == "True" and "compiling the CPU kernels" in said
    files = list((tmp_path / "hybrid_lightning").iterdir())
    assert [path.suffix for path in files] == [".so"], "nothing but the library is left"
    written = files[0].stat().st_mtime_ns
    answer, said = ask(tmp_path, CXX=quick)
    assert answer == "True" and said == "" and files[0].stat().st_mtime_ns == written
    # Another compiler, or other options, may make other code.
    answer, said = ask(tmp_path, CXX=f"{quick} -DOTHER")
    assert answer == "True" and "compiling" in said and len(list((tmp_path / "hybrid_lightning").iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, quick):
    (tmp_path / "file").touch()
    answer, said = ask(tmp_path / "file", CXX=quick)
    assert answer == "True" and "No kernels" not in said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PATH": "/none", "CXX": ""}, ["no C++ compiler was found", "apt install g++"]),
        ({"CXX": shutil.which("false") or "false"}, ["false failed (it said nothing)", "set CXX to another compiler"]),
        ({"HYBRID_LIGHTNING_KERNELS": "0"}, []),  # who wants none is told nothing
    ],
)
def test_who_has_none_is_told_why_and_goes_on(tmp_path, variables, words):
    answer, said = ask(tmp_path, **variables)
    assert answer == "False" and all(part in said for part in words)
    assert said.count("No kernels for this CPU") == 1 if words else not said
    assert not list(tmp_path.glob("*/*"))

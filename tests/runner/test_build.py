"""Kernels are compiled once; where they cannot be, a warning gives the reason and the run continues without them.

This folder is not named `kernels`: tests/ is on the path, and bitsandbytes asks for a package of that name.
"""

import shutil

import pytest

from hybrid_lightning.runner.cpu import build

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


@pytest.fixture
def look(tmp_path, monkeypatch, caplog):
    """Looks for kernels as a process does that begins; gives whether there are some, and what was said."""
    said = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", said.append)

    def looked(**variables):
        for name, value in {"HYBRID_LIGHTNING_KERNELS": "1", "XDG_CACHE_HOME": str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        said.clear()
        caplog.clear()
        build._found.cache_clear()
        return build.library() is not None, "".join(said) + caplog.text

    yield looked
    monkeypatch.undo()
    build._found.cache_clear()


@pytest.fixture
def quick(tmp_path):
    """A compiler that has compiled them before: that they compile is seen as this process loads its own."""
    path = tmp_path / "quick"
    copy = f'[ -z "$made" ] || cp {build.library()._name} "$made"'
    path.write_text(f'#!/bin/sh\nfor word; do [ "$before" = -o ] && made=$word; before=$word; done\n{copy}\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_they_are_compiled_once(tmp_path, quick, look):
    found, said = look(CXX=quick)
    assert found and "compiling the CPU kernels" in said
    files = list((tmp_path / "hybrid_lightning").iterdir())
    assert [path.suffix for path in files] == [".so"], "nothing but the library is left"
    written = files[0].stat().st_mtime_ns
    assert look(CXX=quick) == (True, "") and files[0].stat().st_mtime_ns == written
    # Another compiler, or other options, may make other code.
    found, said = look(CXX=f"{quick} -DOTHER")
    assert found and "compiling" in said and len(list((tmp_path / "hybrid_lightning").iterdir())) == 2
    (tmp_path / "file").touch()
    assert look(CXX=quick, XDG_CACHE_HOME=str(tmp_path / "file"))[0], "a cache that cannot be written is done without"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PATH": "/none", "CXX": ""}, ["no C++ compiler was found", "apt install g++"]),
        ({"CXX": "none-such"}, ["CXX=none-such was not found"]),
        ({"CXX": shutil.which("false") or "false"}, ["false failed (no output)", "set CXX to another compiler"]),
        ({"HYBRID_LIGHTNING_KERNELS": "0"}, []),  # no warning where none is wanted
    ],
)
def test_without_kernels_the_reason_is_printed_and_work_continues(tmp_path, variables, words, look):
    found, said = look(**variables)
    assert not found and all(part in said and part in build.why_none() for part in words)
    assert said.count("no kernels for this CPU") == 1 if words else not said
    assert not list(tmp_path.glob("*/*"))

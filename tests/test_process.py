import os
import subprocess
import sys

import pytest

from hybrid_lightning import process

PROGRAM = """
import os, resource
from hybrid_lightning.process import keep_freed_memory, prepare_process
{prepare}
import torch
print(os.environ.get("GOMP_SPINCOUNT"))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(prepare, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(prepare=prepare)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    spins, faults = done.stdout.split()
    return spins, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told so")
def test_freed_memory_is_used_again_without_faults():
    pages = 8 * 2**22 // os.sysconf("SC_PAGE_SIZE")
    assert run("", MALLOC_MMAP_THRESHOLD_="100000")[1] > pages / 2, "given back and taken again"
    # Eight blocks of 4 MiB, of which at most one may be new: where others have taken the process's memory meanwhile.
    assert run("prepare_process()")[1] < pages / 6


def test_what_the_environment_says_stays():
    assert run("prepare_process()")[0] == process._SPINS
    assert run("prepare_process()", GOMP_SPINCOUNT="7")[0] == "7"
    assert run("prepare_process()", OMP_WAIT_POLICY="PASSIVE")[0] == "None"
    assert run("assert not keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="100000")[1] > 1000


def test_python_dash_m_prepares_its_process():
    code = "import os, runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_module('hybrid_lightning', run_name='__main__')\n"
    code += "except SystemExit: print('spins', os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert f"spins {process._SPINS}" in done.stdout

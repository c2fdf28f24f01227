"""Settings of memory and threads for a process, and how the program begins and ends."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch

from hybrid_lightning import process

PROGRAM = """
import ctypes, os, resource
from hybrid_lightning.process import prepare_process
prepare_process()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
again = faults()
class Heap(ctypes.Structure):
    _fields_ = [(str(place), ctypes.c_size_t) for place in range(10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
def used():
    heap = libc.mallinfo2()
    return getattr(heap, "4") + getattr(heap, "7")
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def products(first):
    before = used()
    for rows in range(first, first + 300):
        torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
    return used() - before
print(again, products(100), products(400))
"""


def run(code, **environment):
    """The output of code without any settings of memory and threads."""
    said = ("MALLOC_", "GOMP_", "OMP_", "ONEDNN_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(said)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_memory_is_used_again_without_faults_and_few_compiled_products_are_kept():
    said = {"MALLOC_MMAP_THRESHOLD_": "100000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}
    (faults, *few), (given_back, *many) = ([int(number) for number in run(PROGRAM, **given).split()] for given in ({}, said))
    assert given_back > 8 * 2**22 // os.sysconf("SC_PAGE_SIZE") / 2, "given back and taken again, as the environment says"
    # Eight blocks of 4 MiB; at most one may be new, in case others have taken the process's memory meanwhile.
    assert faults < 8 * 2**22 // os.sysconf("SC_PAGE_SIZE") / 6
    if many[0] < 2**20:
        pytest.skip("products of this processor are not compiled for each size")
    # Half of a product is freed: of 172 of the first 300 sizes, and of as many as come in the place of others.
    assert few[0] < 0.8 * many[0] and few[1] < 0.6 * many[1]


def setting(name, **environment):
    code = "import os; from hybrid_lightning.process import prepare_process; prepare_process(); "
    return run(code + f"print(os.environ.get({name!r}))", **environment)


def test_what_the_environment_says_stays():
    assert setting("GOMP_SPINCOUNT") == process._SPINS
    assert setting("GOMP_SPINCOUNT", GOMP_SPINCOUNT="7") == "7"
    assert setting("GOMP_SPINCOUNT", OMP_WAIT_POLICY="PASSIVE") == "None"
    capacity = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    assert setting(capacity) == str(process.KEPT_PRODUCTS) and setting(capacity, **{capacity: "7"}) == "7"


def test_python_dash_m_prepares_its_process():
    """Before it imports anything else; the command line's place is taken by what prints this."""
    code = "import os, runpy, sys, types; loaded = lambda: 'torch' in sys.modules\n"
    code += "main = lambda signals: print('spins', os.environ['GOMP_SPINCOUNT'], loaded())\n"
    code += "sys.modules['hybrid_lightning.cli.main'] = types.SimpleNamespace(main=main)\n"
    code += "runpy.run_module('hybrid_lightning', run_name='__main__')"
    assert f"spins {process._SPINS} False" in run(code)


def test_the_console_script_finds_files_of_the_working_folder_first(tmp_path):
    """As `python -m` does; Python itself looks in the script's folder."""
    script, work = tmp_path / "bin" / "hybrid-lightning", tmp_path / "work"
    for folder in (script.parent, work):
        folder.mkdir()
        (folder / "tower.py").write_text(f"print('found in {folder.name}')\n")
    code = "import sys, types\nmain = lambda signals: __import__('tower')\n"
    code += "sys.modules['hybrid_lightning.cli.main'] = types.SimpleNamespace(main=main)\n"
    script.write_text(code + "from hybrid_lightning.__main__ import run\nrun()\n")
    for options, said in (([], "found in work\n"), (["-P"], "")):  # with -P neither
        command = [sys.executable, *options, str(script)]
        assert subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=60, check=False).stdout == said


@pytest.mark.parametrize("left", ["atexit.register(time.sleep, 1000)", "ThreadPoolExecutor().submit(time.sleep, 1000)"])
def test_what_other_code_leaves_running_does_not_hold_up_the_end_for_ever(left):
    code = f"""
import atexit, sys, time, types
from concurrent.futures import ThreadPoolExecutor
from hybrid_lightning import __main__ as program
program._CLEAN_UP_S = 0.2
sys.modules["hybrid_lightning.cli.main"] = types.SimpleNamespace(main=lambda signals: ({left}, sys.exit(3)))
program.run()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3 and ended.stderr.startswith("forced to end: threads or exit handlers still ran 0.2 s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_while_it_is_still_being_imported(tmp_path, number):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(300)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "hybrid_lightning", "fit", "--config=none.yaml"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    with subprocess.Popen(command, cwd=tmp_path, **options) as program:
        assert program.stdout.readline() == "importing\n"
        program.send_signal(number)
        _, said = program.communicate(timeout=30)
    assert program.returncode == 128 + number
    last = f"stopped by {number.name}: there is nothing to resume from yet; start the command again"
    assert said.splitlines()[-1] == last


def test_memory_of_a_gpu_grows_in_place_unless_it_is_set_differently_and_cudnn_does_not_attend(monkeypatch):
    precision, heard, settings = torch.get_float32_matmul_precision(), [], ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: heard.append(("cudnn", on)))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", heard.append, raising=False)
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    process.prepare_gpu(own_allocator=False)
    assert heard == [("cudnn", False), "expandable_segments:True"]
    assert torch.get_float32_matmul_precision() == precision
    products = torch.backends.cuda.matmul  # a module that monkeypatch cannot put back; no CPU reads it
    assert not products.allow_bf16_reduced_precision_reduction and not products.allow_fp16_reduced_precision_reduction
    process.prepare_gpu(own_allocator=True)  # as vLLM does
    for name in settings:
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:512")
            process.prepare_gpu(own_allocator=False)
    assert heard[2:] == [("cudnn", False)] * 3

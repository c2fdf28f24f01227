"""CUDA code that is compiled for GPUs that are not there, as JSON: `python cubins.py FILE CAPABILITY...`, such as 90.

torch's compiler and Triton get a device of made-up properties; Triton's own ptxas makes the code, which nothing runs. What torch
writes for Triton differs between capabilities only where it names them. So torch writes all of it for the first capability, and
one function for each of the others, which shows that; Triton compiles all of it for each.
"""

import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fake_gpu

with tempfile.TemporaryDirectory() as folder:
    fake_gpu.load(Path(folder))

import torch
import triton
from fake_model import adapted
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from triton.backends.compiler import GPUTarget

from benchmarks.memory import plan_qwen3
from hybrid_lightning.adapters import LoraSettings
from hybrid_lightning.rollout import sampler
from hybrid_lightning.runner import compiling, fused_layers, segments
from hybrid_lightning.runner.decoder_layers import compiled_layers

CONFIG, ROWS, RANK = plan_qwen3.config("Qwen3-0.6B"), 256, 16
CUBINS = set()  # of the function that is compiled
AGAIN = "norm, torch.bfloat16, 0, 0"  # what torch writes for every capability


def load_binary(name, code, shared, device):
    CUBINS.add(code)
    return None, None, 32, 0, 1024


def stand_in(capability):
    """Let torch and Triton see a GPU of this compute capability."""
    major, minor = divmod(capability, 10)
    sizes = {"total_memory": 80 * 2**30, "multi_processor_count": 132, "max_threads_per_multi_processor": 2048}
    sizes |= {"regs_per_multiprocessor": 65536, "warp_size": 32, "shared_memory_per_block_optin": 101376}
    properties = SimpleNamespace(name="stand-in", major=major, minor=minor, gcnArchName="", **sizes)
    same = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "device": lambda device=None: nullcontext(),
        "_DeviceGuard": lambda device=None: nullcontext(),
    }
    for name, value in same.items():
        setattr(torch.cuda, name, value)
        if hasattr(CudaInterface, name.removeprefix("_")) and name != "_DeviceGuard":
            setattr(CudaInterface, name.removeprefix("_"), staticmethod(value))
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = same["get_rng_state"], same["set_rng_state"]
    torch.version.cuda = torch.version.cuda or "12.8"
    CudaInterface.is_triton_capable = CudaInterface.raise_if_triton_unavailable = staticmethod(lambda device=None: True)
    CudaInterface.get_raw_stream = staticmethod(lambda device: 0)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: properties)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda:0"),
        get_device_interface=lambda: torch.cuda,
        get_benchmarker=lambda: None,
        utils=SimpleNamespace(
            load_binary=load_binary, get_device_properties=lambda device: {"max_shared_mem": 101376, "multiprocessor_count": 132}
        ),
        launcher_cls=lambda source, metadata: lambda *_, **__: None,
    )
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = lambda: None
    fake_tensor.init_gpu_context = lambda *_: None
    inductor.compile_threads, inductor.use_static_cuda_launcher = 1, False


def cubins_of(source):
    """How many pieces of machine code Triton makes of what torch wrote, and the bytes of the smallest."""
    CUBINS.clear()
    PyCodeCache.load(source)
    return {"cubins": len(CUBINS), "smallest": min(map(len, CUBINS), default=None)}


def code_of(function, arguments, axes):
    """The parts of one function: kernels, calls of torch's own, and checks that tensors are aligned."""
    CUBINS.clear()
    before = len(compiling.CODES)
    source = compiling.compiled(function, arguments, axes).made.source_code
    lines = [line.strip() for line in source[source.index("def call(") :].splitlines() if not line.strip().startswith("#")]
    is_new = len(compiling.CODES) > before
    return {
        "is new": is_new,
        "source": source if is_new else None,
        "cubins": len(CUBINS),
        "smallest": min(map(len, CUBINS), default=None),
        "kernels": sum(".run(" in line for line in lines),
        "products": sum("extern_kernels." in line for line in lines),
        "others": [line for line in lines if "torch.ops." in line or "aten." in line],
        "roundings": source.count(".to(tl.bfloat16)"),
        "looks": sum("copy_if_misaligned(" in line for line in lines),
    }


def renamed(source, capability):
    """The same code for another capability, without what only names the compiler and its files."""
    source, count = re.subn(r"cc=\d+, major=\d+", f"cc={capability}, major={capability // 10}", source)
    assert count, "the code names its capability"
    return re.sub(r"# kernel path: .*", "", re.sub(r"'backend_hash': '\w+'", "'backend_hash': ''", source))


def main(capability):
    stand_in(capability)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        half = dtype == torch.bfloat16
        for share in (0, 0.1):
            fake = adapted(CONFIG, 2, share, LoraSettings(rank=RANK, alpha=32), dtype)

            def part(*sizes, dtype=dtype, fake=fake):
                return fake.fake(torch.empty(sizes, dtype=dtype, device="meta"))

            hidden, heads, groups, size, inner = 1024, 16, 8, 128, 3072
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half), fake.runner.sampling(dtype):
                layers = fake.runner._known_layers()[0]
                for number, layer in enumerate(compiled_layers(layers, layers)):
                    rows = [part(ROWS, hidden), *(part(ROWS, size) for _ in range(2)), part(ROWS, dtype=torch.long)]
                    rows += [part(4096, groups, size) for _ in range(2)]
                    attended = [part(2 * ROWS, groups, size), part(groups, 2 * ROWS, dtype=torch.float32)] * 2
                    for body, given in ((layer.before, rows), (layer.after, [part(ROWS, hidden), *attended])):
                        found[f"{body.function.__name__}, {dtype}, {share}, {number}"] = code_of(
                            body.function, (*given, body.layer), body.axes
                        )
                kernels = {
                    fused_layers.norm: [(part(ROWS, n), part(n), 1e-6) for n in (hidden, size)],
                    fused_layers._norm_gradient: [
                        (part(ROWS, n), part(ROWS, n), part(n), part(ROWS, 1, dtype=torch.float32)) for n in (hidden, size)
                    ],
                    fused_layers._product_of_silu: [[part(ROWS, inner)] * 2],
                    fused_layers._silu_gradients: [[part(ROWS, inner)] * 3],
                    segments.joined_results: [[part(ROWS, heads, size), part(heads, ROWS, dtype=torch.float32)] * 2],
                    sampler._block_sums: [(part(ROWS, 1187, 128, dtype=torch.float32), 1.0)],
                }
                for kernel, calls in kernels.items():
                    for number, given in enumerate(calls):
                        found[f"{kernel._name}, {dtype}, {share}, {number}"] = code_of(kernel.plain, given, kernel._named)
    return found


def of_the_same_source(capability, first):
    """Everything for another capability, from the sources that were found for the first one."""
    stand_in(capability)
    mode = FakeTensorMode()
    empty = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((ROWS, CONFIG.hidden_size), CONFIG.hidden_size)]
    given = [FakeTensor(mode, part, torch.device("cuda:0")) for part in empty]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        written = compiling.compiled(fused_layers.norm.plain, (*given, 1e-6), fused_layers.norm._named).made.source_code
    assert renamed(written, capability) == renamed(first[AGAIN]["source"], capability), "more differs than the capability"
    made = {name: cubins_of(renamed(code["source"], capability)) for name, code in first.items() if code["cubins"]}
    return {name: {**code, **made.get(name, {})} for name, code in first.items()}


def forked(capability, path, first):
    """Write what is found for a capability from a process of its own, which need not import anything; its id."""
    process = os.fork()
    if process:
        return process
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = f"{path}.cache"
        found = main(capability) if first is None else of_the_same_source(capability, first)
        path.write_text(json.dumps(found))
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path, *capabilities = sys.argv[1:]
    found, first = {}, None
    for capability in capabilities:  # one after the other, beside `counts.py`
        part = Path(f"{path}.{capability}")
        assert os.waitpid(forked(int(capability), part, first), 0)[1] == 0, f"no code for {capability}"
        found[capability] = json.loads(part.read_text())
        first = first or found[capability]
    Path(path).write_text(json.dumps(found))

"""The fake GPU's side of `torch.cuda`: facts of a card, waits, events, and CUDA graphs.

Who counts is among the `listeners`. They hear of waits for all that was launched (`waits(what)`), of events (`recorded(event)`,
`waits_for(event)`), and of graphs (`begins(graph)` and `ends(graph)` of a capture, `replays(graph)`).
"""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

CAPABILITY, MEMORY = (9, 0), 80 * 2**30  # of an H100
listeners = []
properties = SimpleNamespace(
    name="fake",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block_optin=101376,
    gcnArchName="",
)


def tell(method, *given):
    for listener in listeners:
        getattr(listener, method)(*given)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
def reported(what, event):
    """From the guard."""
    tell("recorded" if what == b"record" else "waits_for", event)


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert pool == "pool" and streams, "a capture needs a stream of its own"
        assert capture_error_mode == "thread_local", "other threads may launch kernels"
        tell("begins", self)

    def capture_end(self):
        tell("ends", self)

    def replay(self):
        tell("replays", self)


class Stream:
    """In place of `torch.cuda.Stream`; the stream in which kernels are launched is the last of `streams`."""

    def __init__(self, device=None):
        pass

    def synchronize(self):
        tell("waits", "synchronize")


streams = []


@contextmanager
def stream(other):
    streams.append(other)
    yield
    streams.pop()


def stand_in(torch):
    """Replace what asks the card or makes the host wait; all else of `torch.cuda` raises, as in any torch for CPUs."""
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.backends.cuda.is_flash_attention_available = lambda: True
    # torch checks these before it allows autocast: this GPU can do all.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    for place, name in ((torch.cuda, "synchronize"), (torch.accelerator, "synchronize"), (torch.cuda, "empty_cache")):
        setattr(place, name, lambda device=None, name=name: tell("waits", name))
    torch.cuda.current_stream = torch.cuda.default_stream = torch.accelerator.current_stream = Stream
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph_pool_handle = lambda: tell("makes_pool") or "pool"
    torch.cuda.Stream, torch.cuda.stream = Stream, stream

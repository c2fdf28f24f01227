"""Sends the policy's weights to vLLM servers: `GlooTransfer` from anywhere to anywhere, `NcclTransfer` between GPUs.

Each server, with all its workers, has its own connection to the sender, so a fault in one server does not disturb others. The
receiver of `GlooTransfer` is `receiver.py`; the receiver of `NcclTransfer` is in vLLM.
"""

import math
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from hybrid_lightning.errors import RolloutError, one_line
from hybrid_lightning.rollout.future import in_thread
from hybrid_lightning.rollout.vllm import BACKEND
from hybrid_lightning.rollout.vllm.names import NCCL, check_names, installed_version

if TYPE_CHECKING:
    from hybrid_lightning.rollout.interface import ServedModel
    from hybrid_lightning.rollout.vllm.server_client import Server

REQUEST = "request to a vLLM server"  # name of threads
_LIMIT_S = 120.0  # longest time to send a weight
_SLOWEST = 1e7  # bytes per second on the slowest network
_FACTS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Update:
    """The weights to send to a server."""

    shapes: Mapping[str, tuple[int, ...]]  # of each weight, in the order of sending
    dtype: torch.dtype  # dtype of sending
    everything: bool  # whether these are all weights of the model
    adapter: Mapping[str, Any] | None = None  # PEFT's config of the LoRA factors among them

    @property
    def description(self) -> dict[str, Any]:
        """Description of the update for receivers."""
        return {"names": list(self.shapes), "shapes": [list(shape) for shape in self.shapes.values()]}

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as float32."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def largest(self) -> int:
        """Numbers in the largest weight."""
        return max(map(math.prod, self.shapes.values()), default=0)

    @property
    def longest_s(self) -> float:
        """Seconds to send all of them over the slowest network."""
        return sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize / _SLOWEST


class Transfer(ABC):
    """Sends weights to a server.

    Args:
        server: The server.
        address: Address under which it reaches this machine.
        timeout: Longest time for a request in seconds.
        model: The policy's model.
    """

    folder: str  # on the server's machine, for separate LoRA
    _answer: "Future[None]"  # the server's answer to the current update
    _longest: float  # time for it in seconds

    def __init__(self, server: "Server", address: str, timeout: float, model: "ServedModel") -> None:
        self._server, self._address, self._timeout, self._model = server, address, timeout, model
        self._ranks = 1 + server.facts.workers
        self._limit = min(timeout, _LIMIT_S)
        self.folder = f"/tmp/hybrid_lightning-{uuid.uuid4().hex}"

    @abstractmethod
    def connect(self) -> None:
        """Connect to all workers of the server.

        Raises:
            RolloutError: If the server refuses, for example because it has another model.
        """

    def begin(self, update: Update) -> None:
        """Prepare the server for the weights of an update.

        Raises:
            RolloutError: If it refuses.
        """
        self._longest = self._timeout + update.longest_s
        self._server.start_weight_update()
        self._answer = in_thread(lambda: self._server.update_weights(self._update_info(update), self._longest), REQUEST)

    def give(self, value: Tensor) -> None:
        """Send the next weight. When this returns, its memory may be overwritten.

        Raises:
            RolloutError: If the server does not take it. The connection is then closed.
        """
        answer = self._answer
        try:
            if answer.done():
                answer.result()
            self._broadcast(value, answer)
        except Exception as error:
            self.close()  # now, while the value is still in memory for its readers
            if isinstance(error, RolloutError):
                raise
            if wait([answer], self._limit / 10).done:  # the worker has closed the connection; its answer has the reason
                answer.result()
            raise RolloutError(f"{self._server.url}: the connection for weights broke: {one_line(error)}") from error

    def end(self) -> None:
        """Make the server use the received weights.

        Raises:
            RolloutError: If it has not loaded them.
        """
        _wait_for(self._answer, self._longest)
        self._server.finish_weight_update()

    @abstractmethod
    def close(self) -> None:
        """Close the connection, even if something is in progress."""

    @abstractmethod
    def _update_info(self, update: Update) -> dict[str, Any]:
        """Description of an update for the server."""

    @abstractmethod
    def _broadcast(self, value: Tensor, answer: "Future[None]") -> None:
        """Send a weight to all workers, and wait until they have it or the server's answer explains why not."""

    def _wait_until(self, is_over: Callable[[], bool], answer: "Future[None]", what: str, remedy: str) -> None:
        """Wait, and watch the server's answer in the meantime.

        Raises:
            RolloutError: If it is not over within the limit.
        """
        began = time.monotonic()
        while not is_over():
            if answer.done():
                answer.result()
            waited = time.monotonic() - began
            if waited > self._limit:
                raise RolloutError(f"{self._server.url}: {what} within {self._limit:.0f} s; {remedy}")
            time.sleep(min(1e-4 + waited / 10, 0.005))


class GlooTransfer(Transfer):
    """Sends weights over gloo, which needs no GPU; separate LoRA goes into a folder on the server's machine."""

    _store: TCPStore | None = None
    _group: ProcessGroupGloo | None = None

    def connect(self) -> None:
        """Connect to all workers of the server over gloo, once they have announced themselves."""
        self.close()
        limit = timedelta(seconds=self._limit)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
        init_info = {"host": self._address, "port": store.port, "ranks": self._ranks, "config": facts_of(self._model.config)}
        init_info["timeout_s"] = 2 * self._limit  # leaves time to wait for another server that hangs
        # A server that refuses does not come, so the group is made only when all workers have announced themselves.
        answer = in_thread(lambda: self._server.init_weight_transfer_engine(init_info), REQUEST)
        present = [f"worker {rank}" for rank in range(1, self._ranks)]
        what = f"its workers do not reach this machine at {self._address}:{store.port}"
        self._wait_until(lambda: store.check(present), answer, what, "open the ports between them, or set sampler.address")
        self._group = gloo_group(store, 0, self._ranks, local_address(self._server.url), limit)
        self._store = store
        _wait_for(answer, self._limit)

    def close(self) -> None:
        """Close the connection."""
        self._group = self._store = None

    def _update_info(self, update: Update) -> dict[str, Any]:
        extra = {"dtype": update.dtype_name, "everything": update.everything, "adapter": update.adapter, "folder": self.folder}
        return update.description | extra

    def _broadcast(self, value: Tensor, answer: "Future[None]") -> None:
        group = self._group  # kept until it has ended, even if the connection is closed in the meantime
        assert group is not None, "connect has to be called first"
        group.broadcast(value, 0).wait()  # type: ignore[attr-defined]  # not declared by torch


class NcclTransfer(Transfer):
    """Sends weights from GPU to GPUs over NCCL, for vLLM's own receiver; needs vLLM in this environment, too.

    NCCL waits on the GPU forever for workers that have died. So each server has its own stream, which nothing else waits for, and
    the host polls it. A broadcast that does not end is aborted, together with everything else on the stream.
    """

    _communicator: Any = None  # vLLM's PyNcclCommunicator
    _stream: torch.cuda.Stream | None = None

    def __init__(self, server: "Server", address: str, timeout: float, model: "ServedModel") -> None:
        super().__init__(server, address, timeout, model)
        self._device = model.device  # the GPU that trains, on its default stream
        self._closing = threading.Lock()

    def connect(self) -> None:
        """Connect to all workers of the server over NCCL."""
        self.close()
        self._stream = torch.cuda.Stream(self._device)
        port = find_free_network_port()
        # Not packed: weights are sent from the one buffer that they are computed in.
        init_info = {"master_address": self._address, "master_port": port, "rank_offset": 1, "world_size": self._ranks}
        answer = in_thread(lambda: self._server.init_weight_transfer_engine(init_info | {"packed": False}), REQUEST)
        joined = in_thread(lambda: self._join(port), REQUEST)
        what = f"its workers and this machine do not connect over NCCL at {self._address}:{port}"
        remedy = "open the ports between them, set sampler.address, or set NCCL_SOCKET_IFNAME here and there"
        try:
            self._wait_until(joined.done, answer, what, remedy)
            joined.result()
            _wait_for(answer, self._limit)
        except Exception:
            self.close()
            raise

    def _join(self, port: int) -> None:
        check_names(NCCL, installed_version(), "this environment")
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        group = StatelessProcessGroup.create(self._address, port, 0, self._ranks, store_timeout=math.ceil(self._limit))
        # Stored before it is initialized: initialization ends with a first all-reduce, which may have to be aborted as well.
        self._communicator = communicator = PyNcclCommunicator.__new__(PyNcclCommunicator)
        with torch.cuda.stream(self._stream), unpinned_nccl_env():
            communicator.__init__(group, self._device)
        if communicator.disabled:  # it would silently send nothing
            remedy = f'start the server with --weight-transfer-config \'{{"backend": "{BACKEND}"}}\', or install NCCL'
            raise RolloutError(f"{self._server.url}: vLLM finds no NCCL in training's environment; {remedy}")

    def close(self) -> None:
        """Abort pending work, and close the connection."""
        with self._closing:
            communicator, self._communicator = self._communicator, None
        if hasattr(communicator, "comm"):
            communicator.destroy()  # this calls ncclCommAbort

    def _update_info(self, update: Update) -> dict[str, Any]:
        return update.description | {"dtype_names": [update.dtype_name] * len(update.shapes)}

    def _broadcast(self, value: Tensor, answer: "Future[None]") -> None:
        assert self._communicator is not None and self._stream is not None, "connect has to be called first"
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))  # the value is computed on this stream
            self._communicator.broadcast(value, 0, self._stream)
            sent = self._stream.record_event()
        remedy = "check its log and restart it; if NCCL uses the wrong network, set NCCL_SOCKET_IFNAME here and there"
        self._wait_until(sent.query, answer, "its workers took no weight over NCCL", remedy)


def _wait_for(answer: "Future[None]", limit: float) -> None:
    """Wait until a call has returned, and raise its exception."""
    if not wait([answer], limit).done:
        raise RolloutError(f"no answer within {limit:.0f} s")
    answer.result()


def gloo_group(store: TCPStore, rank: int, ranks: int, address: str, limit: timedelta) -> ProcessGroupGloo:
    """Connect processes by gloo, on the network of one of this machine's addresses."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not declared by torch
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    return ProcessGroupGloo(PrefixStore("weights", store), rank, ranks, options)


def local_address(url: str) -> str:
    """The address of this machine on the network by which it reaches a server."""
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or (443 if parts.scheme == "https" else 80)
    places = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    # IPv4 first: servers without a given address listen there.
    family, kind, _, _, place = min(places, key=lambda found: found[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def facts_of(config: Any) -> dict[str, bool | int | float | str]:
    """The plain values in a model's transformers config that change its results or shapes."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = text.to_dict()
    rope = values.get("rope_parameters")  # rope_theta itself in older versions of transformers
    values = (rope if isinstance(rope, dict) else {}) | values
    return {name: values[name] for name in _FACTS if isinstance(values.get(name), (bool, int, float, str))}


def check_facts(mine: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if a server's model differs from the policy's, comparing the facts of both (see `facts_of`)."""
    for name, value in wanted.items():
        if name in mine and mine[name] != value:
            raise ValueError(f"another model: {name} is {mine[name]!r} there and {value!r} in the policy's config")


def check_joined(names: Collection[str], model: Any) -> None:
    """Raise ValueError if a layer that vLLM joins gets only some of its parts: vLLM itself would not report it.

    Args:
        names: Names of the weights of an update, as in a checkpoint.
        model: Model of vLLM.
    """
    joined: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    siblings = {part: parts for parts in joined.values() if len(parts) > 1 for part in parts}
    came = set(names)
    for name in names:
        pieces = name.split(".")
        for place, piece in enumerate(pieces):
            for part in siblings.get(piece, ()):
                other = ".".join([*pieces[:place], part, *pieces[place + 1 :]])
                if other not in came and pieces[-1] == "weight":
                    raise ValueError(f"{name} came without {other}, and vLLM joins the two; all parts have to come together")

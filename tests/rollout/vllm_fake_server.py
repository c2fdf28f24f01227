"""A server that speaks the part of vLLM's protocol that is used, in this process: completions are made up, weights really come.

Log-probabilities of prompts come from a model with the weights that were sent.

What real vLLM 0.32 answers was looked up there: statuses, error texts, and the names in its answers. Faults can be planted.
"""

import contextlib
import copy
import json
import random
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import torch
from tiny_models import VOCABULARY, build_model, build_tokenizer
from torch.distributed import TCPStore

from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.rollout.future import in_thread
from hybrid_lightning.rollout.interface import SamplingRequest, WeightsVersion
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.vllm.transfer import check_facts, check_joined, facts_of, gloo_group
from hybrid_lightning.types import Prompt

MODEL = build_model("llama")
ENGINE = SimpleNamespace(model=MODEL)
PRETRAINED = SimpleNamespace(tokenizer=build_tokenizer(), clone_for_thread=lambda: PRETRAINED)
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
JOINED = {"qkv_proj": PROJECTIONS, "gate_up_proj": ["gate_proj", "up_proj"]}


# Names of paths that need no more than a line -> what is done and answered.
PLAIN = {
    "version": lambda fake, body: {"version": fake.version},
    "v1_models": lambda fake, body: {"data": [{"id": fake.model, "max_model_len": fake.context}]},
    "get_world_size": lambda fake, body: {"world_size": 1},
    "weight_info": lambda fake, body: {"weight_version": fake.label},
    "update_weight_version": lambda fake, body: setattr(fake, "label", body["new_version"]),
    "tokenize": lambda fake, body: {"tokens": fake.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]},
    "resume": lambda fake, body: setattr(fake, "paused", False),
    "reset_prefix_cache": lambda fake, body: {"success": not fake.running or body["reset_running_requests"] == "true"},
}


class WorkerError(Exception):
    """An error in a worker that vLLM's answer reports."""


class FakeServer:
    """The server, in threads of its own. Its attributes may be changed at any time."""

    def __init__(self, tokenizer=None, config=None, model: str = "served") -> None:
        self.tokenizer, self.config, self.model = tokenizer, config, model
        self.version, self.context, self.sequences = "0.32.0", 64, 8
        self.lora: dict | None = None  # its config of LoRA
        self.description: dict | None = None  # its description of its paths
        self.dtype, self.logprobs_mode, self.backend = "torch.float32", "processed_logprobs", "hybrid_lightning"
        self.missing: set[str] = set()  # paths that it does not have
        self.key = ""  # API key
        self.delay = 0.0  # seconds for a completion
        self.seeded = False  # completions follow from their seed alone, whatever the weights
        self.hangs = False  # it takes requests, and does not answer
        self.drips = False  # it answers a byte a second
        self.on_cpu = False
        self.loses_weights = False  # updates end well, and change nothing but the label
        self.fails = 0  # requests for completions to answer with status 500 next
        self.fails_updates = 0  # updates in which the worker fails after the first weight
        self.dies_in_updates = 0.0  # seconds after the first weight in which the server dies
        self.requests: list[tuple[str, dict]] = []  # path and body of each request
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start again: it then has its own weights."""
        self.label, self.paused, self.active = "default", False, False
        self.weights: dict[str, torch.Tensor] = {}
        self.updates: list[list[str]] = []  # names of the weights of each update
        self.group = self.store = None
        self.running = set[str]()  # names of requests
        self.ended = set[str]()  # of aborted requests
        self.stopped = threading.Event()
        self.connections = set[socket.socket]()
        bound = type("Bound", (_Handler,), {"fake": self})
        self.http = _Http(("127.0.0.1", self.port), bound)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Die: close all connections, that for weights too."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.http.shutdown()
            self.http.server_close()
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.group = self.store = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def asked(self, path: str) -> list[dict]:
        """Bodies of the requests for a path."""
        return [body for asked, body in list(self.requests) if asked == path]

    # ---- what it answers

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        name = path.strip("/").replace("/", "_")
        if path == "/openapi.json" and self.description:
            return 200, self.description
        method = getattr(self, f"on_{name}", PLAIN.get(name) and partial(PLAIN[name], self))
        if method is None or path in self.missing:
            return 404, {"detail": "Not Found"}
        try:
            answer = method(body)
        except WorkerError as error:
            text = f"Call to collective_rpc method failed: Worker failed with error '{error}', please check the stack trace above"
            return 500, {"error": {"message": f"{text} for the root cause", "type": "InternalServerError", "code": 500}}
        return answer if isinstance(answer, tuple) else (200, answer or {"message": "done"})

    def on_server_info(self, body):
        model = {"max_model_len": self.context, "dtype": self.dtype, "logprobs_mode": self.logprobs_mode}
        config = {"model_config": model, "scheduler_config": {"max_num_seqs": self.sequences}}
        config["device_config"] = {"device": "cpu" if self.on_cpu else "cuda"}
        config["lora_config"] = self.lora and {"target_modules": None, **self.lora}
        return {"vllm_config": {**config, "weight_transfer_config": self.backend and {"backend": self.backend}}}

    def on_v1_load_lora_adapter(self, body):
        return (200, "Success: LoRA adapter added") if body else (405, {"detail": "Method Not Allowed"})

    def on_pause(self, body):
        self.paused = True
        if body["mode"] == "abort":
            self.ended |= self.running

    def on_init_weight_transfer_engine(self, body):
        asked = body["init_info"]
        if self.backend == "nccl":  # over which FakeNccl goes by gloo, and waits until each weight is taken
            assert asked["rank_offset"] == 1 and asked["packed"] is False
            asked = {"host": asked["master_address"], "port": asked["master_port"], "ranks": asked["world_size"]}
            asked |= {"config": {}, "timeout_s": 5}
        try:
            check_facts(facts_of(self.config) if self.config else {}, asked["config"])
        except ValueError as error:
            raise WorkerError(error) from error
        if asked["port"]:
            limit = timedelta(seconds=asked["timeout_s"])
            self.store = TCPStore(asked["host"], asked["port"], is_master=False, timeout=limit)
            self.store.set("worker 1", "")
            self.group = gloo_group(self.store, 1, asked["ranks"], "127.0.0.1", limit)

    def on_shutdown_weight_transfer_engine(self, body):
        if self.active:
            raise WorkerError("Cannot release a trainer connection during a weight update")
        self.group = self.store = None

    def on_start_weight_update(self, body):
        if self.active:
            raise WorkerError("start_weight_update called while a weight update is already active.")
        self.active = True

    def on_update_weights(self, body):
        update, group = body["update_info"], self.group
        try:
            check_joined(update["names"], SimpleNamespace(packed_modules_mapping=JOINED))
            for name, shape in zip(update["names"], update["shapes"], strict=True):
                value = torch.empty(shape, dtype=getattr(torch, update.get("dtype") or update["dtype_names"][0]))
                group.broadcast(value, 0).wait()
                if self.backend == "nccl":
                    group.barrier().wait()
                if not self.loses_weights:
                    self.weights[name] = value
                if self.fails_updates:
                    self.fails_updates -= 1
                    raise WorkerError("out of memory")
                if self.dies_in_updates:
                    time.sleep(self.dies_in_updates)
                    self.stop()
                    raise WorkerError("nobody receives this")
        except Exception as error:
            self.active, self.group, self.store = False, None, None
            raise WorkerError(error) from error
        self.updates.append(update["names"])

    def on_finish_weight_update(self, body):
        if not self.active:
            raise WorkerError("finish_weight_update called without a matching start_weight_update.")
        self.active = False

    def on_inference_v1_abort_requests(self, body):
        self.ended |= set(body["request_ids"])

    def on_inference_v1_generate(self, body):
        if not body:
            return 405, {"detail": "Method Not Allowed"}
        if self.fails:
            self.fails -= 1
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        asked, label = body["sampling_params"], self.label
        if "prompt_logprobs" in asked and not self.hangs:
            return 200, self.scored(body["token_ids"])
        if asked["n"] > self.sequences:
            return 400, {"error": {"message": f"sampling_params.n must be at most the server's max_num_seqs ({self.sequences})"}}
        until = time.monotonic() + self.delay
        name = f"generate-tokens-{body['request_id']}"
        self.running.add(name)
        while self.hangs or self.paused or time.monotonic() < until:
            if self.stopped.wait(0.005) or name in self.ended:
                break
        self.running.discard(name)
        reason, labels = "abort" if name in self.ended else "stop", (label, self.label)
        seeded = asked if self.seeded else None
        choices = [_choice(body["token_ids"], number, reason, *labels, seeded) for number in reversed(range(asked["n"]))]
        return 200, {"choices": choices}

    def scored(self, ids):
        """Log-probabilities of a prompt by the weights that came."""
        model = copy.deepcopy(MODEL)
        model.load_state_dict(self.weights, strict=False)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
        of_tokens = [{str(token): {"logprob": row[token]}} for token, row in zip(ids[1:], logprobs, strict=False)]
        versions = [{"version": self.label, "start": 0, "end": 1}]
        return {"prompt_logprobs": [None, *of_tokens], "choices": [{"token_ids": [1], "weight_versions": versions}]}


def _choice(prompt, number, reason, label, last, seeded=None):
    """Completion `number` of a prompt, which names the prompt; its first token depends on the weights at its start."""
    tokens = [2 + sum(prompt) % 11, 2 + number, 1]
    if seeded is not None:
        draws = random.Random(seeded["seed"] + number)
        tokens = [draws.randrange(3, VOCABULARY) for _ in range(draws.randint(2, seeded["max_tokens"]))]
    logprobs = {"content": [{"token_id": token, "logprob": -0.5 * token} for token in tokens]}
    made_by = [{"version": label, "start": 0, "end": 1}, {"version": last, "start": 1, "end": len(tokens)}][: 1 + (label != last)]
    return {"index": number, "finish_reason": reason, "token_ids": tokens, "weight_versions": made_by, "logprobs": logprobs}


class _Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request, client_address):
        """Print nothing about connections that a test has cut."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def setup(self):
        super().setup()
        self.fake.connections.add(self.connection)

    def finish(self):
        self.fake.connections.discard(self.connection)
        super().finish()

    def do_POST(self):
        path, sent = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(sent or b"{}") | dict(parse_qsl(urlsplit(self.path).query))
        self.fake.requests.append((path, body))
        if self.fake.key and self.headers.get("Authorization") != f"Bearer {self.fake.key}":
            status, content = 401, {"error": "Unauthorized"}
        else:
            while self.fake.hangs and path != "/inference/v1/generate" and not self.fake.stopped.wait(0.005):
                pass
            try:
                status, content = self.fake.answer(path, body)
            except Exception as error:  # of the fake itself, or of the tokenizer
                status, content = 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
        if self.fake.stopped.is_set():
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data if self.fake.drips else ():
            self.wfile.write(bytes([byte]))
            if self.fake.stopped.wait(1):
                return
        self.wfile.write(data)

    def do_GET(self):
        self.do_POST()

    def log_message(self, *args):
        pass


class FakeStream:
    """Stands in for a CUDA stream: its recorded work is done once the broadcasts on it have succeeded."""

    def __init__(self, device=None):
        self.waited, self.jobs = [], []

    def wait_stream(self, other):
        self.waited.append(other)

    def record_event(self):
        jobs = list(self.jobs)
        return SimpleNamespace(query=lambda: all(job.done() and job.exception() is None for job in jobs))


class FakeNccl:
    """Stands in for NCCL and a GPU: broadcasts go over gloo, read what they send late, and hang where gloo would fail."""

    def __init__(self, monkeypatch):
        self.training, self.communicators, empty = FakeStream(), [], torch.empty
        communicators = self.communicators

        class Communicator:
            comm, disabled, aborts, stream = "of NCCL", False, 0, None

            def __init__(self, group, device):
                communicators.append(self)
                self.group = gloo_group(*group, "127.0.0.1", timedelta(seconds=6))

            def broadcast(self, value, source, stream):
                assert not self.aborts, "it does nothing then, and does not say so"

                def late():
                    time.sleep(0.01)
                    self.group.broadcast(value, source).wait()
                    self.group.barrier().wait()

                stream.jobs.append(in_thread(late, "vLLM"))
                self.stream = stream

            def destroy(self):
                self.aborts += 1

        def create(host, port, rank, ranks, store_timeout):
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False), rank, ranks

        vllm = SimpleNamespace(PyNcclCommunicator=Communicator, StatelessProcessGroup=SimpleNamespace(create=create))
        vllm.unpinned_nccl_env = contextlib.nullcontext
        for name in ("distributed.device_communicators.pynccl", "distributed.utils", "utils.nccl"):
            monkeypatch.setitem(sys.modules, f"vllm.{name}", vllm)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: self.training)
        monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))


# ---- what tests ask of it


class Weight:
    def __init__(self, name, value):
        self.name, self.value, self.shape = name, value, value.shape

    def write_rows(self, destination, first):
        destination.copy_(self.value[first : first + len(destination)])


class Weights:
    """Weights of a policy; training changes the attention of the second layer."""

    adapter = None

    def __init__(self, step, base="base", sender=True, values=None):
        self.version, self.base, self.is_sender = WeightsVersion(step, f"{step}abc"), base, sender
        generator = torch.Generator().manual_seed(step)
        names = [f"layers.{layer}.self_attn.{part}.weight" for layer in range(2) for part in PROJECTIONS] + ["norm.weight"]
        self.values = values or {name: torch.randn(8, 4, generator=generator) for name in names}
        self.passes = []  # over the weights: how many came in each

    def _chosen(self, everything):
        return {name: value for name, value in self.values.items() if everything or "layers.1" in name}

    def shapes(self, everything):
        return {name: tuple(value.shape) for name, value in self._chosen(everything).items()}

    def stream(self, everything):
        self.passes.append(0)
        for name, value in self._chosen(everything).items():
            self.passes[-1] += 1
            yield Weight(name, value)


FACTOR = "base_model.model.layers.1.self_attn.o_proj.lora_A.weight"


class Factors(Weights):
    """Weights of a policy with the LoRA apart from the base."""

    def __init__(self, step, on=True):
        super().__init__(step)
        self.adapter, self.factors = {"r": 2} if on else None, {FACTOR: torch.ones(2, 4)} if on else {}

    def _chosen(self, everything):
        return (self.values if everything else {}) | self.factors


def begin_rollout(sampler, ids, samples=2, seed=0, **options):
    """Begin a rollout of prompts of these token ids."""
    prompts = [Prompt(text=str(number), index=number) for number in range(len(ids))]
    request = SamplingRequest(prompts, ids, samples, PromptDraws(prompts, samples, seed), **options)
    return Episodes(None, None, PRETRAINED).begin(sampler, ENGINE, request)


def complete(sampler, prompts=12, samples=4):
    """Complete prompts, and make sure that each has its own answers, in order."""
    ids = [[3, 4 + number] for number in range(prompts)]
    sequences = begin_rollout(sampler, ids, samples).result().sequences
    assert sequences.completion_ids.tolist() == [
        [2 + sum(prompt) % 11, 2 + number, 1] for prompt in ids for number in range(samples)
    ]
    assert sequences.weights_step.unique().tolist() == [sampler.version.step]


def shares(*servers):
    """How many requests for completions each got; the check asks for the page itself, without a body."""
    asked = [server.asked("/inference/v1/generate") for server in servers]
    return [len([body for body in bodies if "logprobs" in body.get("sampling_params", ())]) for bodies in asked]

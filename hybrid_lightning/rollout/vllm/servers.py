"""`VLLMServerSampler`: completions by one or several vLLM servers, on this or other machines."""

import asyncio
import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, RolloutError, one_line
from hybrid_lightning.rollout.future import in_thread
from hybrid_lightning.rollout.interface import (
    Begun,
    MessageRequest,
    Playable,
    PolicyWeight,
    PolicyWeights,
    PromptLogprobs,
    Sampled,
    SamplingRequest,
    ServedModel,
    WeightsVersion,
)
from hybrid_lightning.rollout.playing import NOTHING, AtOnce, Surroundings
from hybrid_lightning.rollout.vllm import BACKEND
from hybrid_lightning.rollout.vllm.completing import (
    Answer,
    VLLMEngine,
    check_answer,
    one_version,
    prompt_draws,
    steps_of,
    vocabulary_of,
)
from hybrid_lightning.rollout.vllm.dispatch import STARTED, Dispatch, IdleClock
from hybrid_lightning.rollout.vllm.outage import Outage
from hybrid_lightning.rollout.vllm.server_checks import check_server
from hybrid_lightning.rollout.vllm.server_client import Server, ServerError
from hybrid_lightning.rollout.vllm.transfer import REQUEST, GlooTransfer, NcclTransfer, Transfer, Update, local_address

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner

_UPDATING = "updating"  # label of a server that is receiving weights
# Seconds for a server to report its weights, and for a server that could not be updated.
_FIRST_S, _AGAIN_S = 30.0, 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_T = TypeVar("_T")


class VLLMServerSampler(VLLMEngine):
    """Samples with vLLM servers, which receive the policy's weights before each rollout.

    The prompts of a rollout are distributed over the servers. If a server fails, the others complete its prompts. A server that
    was restarted is used again from the next rollout on. Servers are never shut down.

    Start each server with `VLLM_SERVER_DEV_MODE=1`, `--enable-scale-out`, `--logprobs-mode processed_logprobs`,
    `--generation-config vllm` and `--weight-transfer-config`, with the backend `nccl` on GPUs and `hybrid_lightning` on CPUs. If
    servers require an API key, it is read from the environment variable VLLM_API_KEY.

    Args:
        urls: Addresses of the servers, such as `[http://node7:8000, http://node8:8000]`.
        timeout: Time limit for one request in seconds; after that, another server gets the request.
        give_up_after: The run stops, and can be resumed, if for this many seconds no server answers, completes a request or takes
            weights. Until then servers are tried again, at growing intervals.
        address: Address under which the servers reach this machine; None takes the address by which this machine reaches them.
        options: Arguments of `RolloutEngine`.

    Raises:
        ConfigError: If a value is impossible.
    """

    is_remote = True

    def __init__(
        self,
        *,
        urls: list[str],
        timeout: float = 600,
        give_up_after: float = 300,
        address: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(urls, str):
            raise ConfigError(f"sampler.urls must be a list, got the string {urls!r}; write [{urls}]")
        if not urls:
            raise ConfigError("sampler.urls is empty; name at least one vLLM server, such as [http://node7:8000]")
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ConfigError(f"sampler.urls must be addresses such as http://node7:8000, got {url!r}")
        urls = [url.rstrip("/") for url in urls]
        if len(set(urls)) < len(urls):
            raise ConfigError(f"sampler.urls names a server twice: {', '.join(urls)}; name each once")
        for name, seconds in (("timeout", timeout), ("give_up_after", give_up_after)):
            if not seconds > 0:
                raise ConfigError(f"sampler.{name} must be positive, got {seconds}; it is in seconds")
        self.urls, self.timeout, self.give_up_after, self.address = urls, timeout, give_up_after, address
        self._servers = [Server(url, timeout, os.environ.get("VLLM_API_KEY")) for url in urls]
        self._transfers: dict[Server, Transfer] = {}  # connections that bring weights to a server
        self._base = ""  # `PolicyWeights.base` when the base weights were sent
        self._left_out: dict[Server, str] = {}  # servers that could not be updated, and why
        self._taking: list[Server] = []  # servers that take the weights of the current update
        self._dispatches: list[Dispatch] = []  # may have open requests
        self._refusing: set[Server] = set()  # servers that refuse, and will refuse until they are restarted
        self._outage = Outage(give_up_after)
        self._idle = IdleClock()

    def check_model(self, model: ServedModel) -> None:
        """Make sure that all servers answer (one of them at a resume) and have the policy's model.

        Raises:
            ConfigError: If one has been started for something else.
            RolloutError: If one does not answer; at a resume, if none does.
        """
        found = self._of_each(self._servers, lambda server: check_server(server, model, self.max_new_tokens, self.sends_adapter))
        missing = [s for s, failure in found.items() if isinstance(failure, ServerError) and not failure.is_final]
        if model.resumed and len(missing) < len(found):
            for server in missing:
                self._leave_out(server, str(found.pop(server)))
        for failure in found.values():
            if isinstance(failure, ServerError):
                raise RolloutError(
                    f"{failure}; start the server, or remove it from sampler.urls (docs/how-to/vllm.md has the command)"
                ) from failure
            if failure is not None:
                raise failure
        kinds = sorted({str(server.facts.backend) for server in found})
        if len(kinds) > 1:
            raise ConfigError(f"the servers have different weight transfers ({', '.join(kinds)}); start all with the same one")

    def context(self, config: Any) -> tuple[float, str]:
        """The model's limit, or a server's limit."""
        least = min((server.facts.context for server in self._servers if server.is_known), default=math.inf)
        return min(super().context(config), (least, f"a server's context of {least} tokens (--max-model-len)"))

    # ---- weights

    def needs_everything(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether a server has weights other than the last update's; repeats until one answers, and only on the sender.

        Raises:
            RolloutError: If none answers within `give_up_after`.
        """
        labels = next(labels for _ in self._attempts() if (labels := self._labels()))
        if not all(self._has_base(server, label, self.version, model) for server, label in labels.items()):
            return True
        return weights.base != self._base and self.version is not None

    def _has_base(self, server: Server, label: str, before: WeightsVersion | None, model: ServedModel) -> bool:
        """Whether a server with this label needs only the weights that training changes; it should have the version before."""
        if before is not None or not self.sends_adapter:
            return label == str(before)
        return label == STARTED and model.folder is not None and server.facts.reads_weights

    def update(
        self, weights: PolicyWeights, model: ServedModel, everything: bool | None = None, keeps_requests: bool = False
    ) -> None:
        """Send the servers the policy's weights, unless they have them already.

        Given the result of `needs_everything`, the weights are iterated over exactly once, as on other ranks. Without it a failed
        update is repeated.

        Raises:
            RolloutError: If no server could be updated within `give_up_after`.
        """
        alone = everything is None
        everything = self.needs_everything(weights, model) if everything is None else everything
        if not everything and self.version == weights.version:
            self._outage.end()
            return
        self.accept_weights(weights.version)
        before, self.version = self.version, None  # until all has succeeded; without a version, everything is sent next time
        stream = weights.stream(everything)
        try:
            for _ in self._attempts() if weights.is_sender else ():
                updated = self._update(weights, stream, model, before, everything, keeps_requests)
                if updated:
                    break
                if updated is False and not alone:
                    raise RolloutError(f"no vLLM server took the policy's weights: {self._why()}; restart the servers")
                if updated is False:
                    everything, stream = True, weights.stream(True)
        finally:
            if not isinstance(sys.exception(), (KeyboardInterrupt, SystemExit)):
                deque(stream, maxlen=0)  # read it to the end: other ranks gather the weights with this one, and would wait
        self.version, self._base = weights.version, weights.base
        self._outage.end()
        self.accept_weights(weights.version)

    def accept_weights(self, version: WeightsVersion) -> None:
        """Accept tokens sampled with these weights from open requests."""
        for dispatch in self._running:
            dispatch.accept_weights(str(version))

    @property
    def has_lost_weights(self) -> bool:
        """Whether open requests wait for restarted servers, which need weights from `update`."""
        return any(dispatch.has_lost_weights for dispatch in self._running)

    @property
    def _running(self) -> list[Dispatch]:
        """Dispatches of rollouts in progress."""
        return [dispatch for dispatch in self._dispatches if not dispatch.has_ended]

    def _update(
        self,
        weights: PolicyWeights,
        stream: Iterator[PolicyWeight],
        model: ServedModel,
        before: WeightsVersion | None,
        everything: bool,
        keeps_requests: bool,
    ) -> bool | None:
        """Send weights in one pass to all reachable servers, which should have the version `before`.

        Returns:
            Whether a server has the weights afterwards; None if no server could be reached, and the pass has not begun.
        """
        labels = self._labels()
        has_them = [server for server, label in labels.items() if before == weights.version and label == str(before)]
        chosen = [server for server in labels if server not in has_them]
        if not everything:
            for server in [server for server in chosen if not self._has_base(server, labels[server], before, model)]:
                self._leave_out(server, f"it has weights {labels[server]}, since it was restarted")
                chosen.remove(server)
        if labels and not chosen:
            return bool(has_them)
        update = Update(weights.shapes(everything), model.dtype, everything, weights.adapter)
        self._taking = list(chosen)
        try:
            self._settle(self._in_threads(chosen, partial(self._prepare, update, model, keeps_requests)), 2 * self.timeout)
            if not self._taking:
                return True if has_them else None
            self._send(update, stream, model)
            finished = self._in_threads(self._taking, partial(self._finish, update, str(weights.version)))
            self._settle(finished, 2 * self.timeout + update.longest_s)
        except BaseException:
            self._taking = []
            for server in chosen:
                self._disconnect(server)  # so that no pending work stays on the GPU
            raise
        for server in self._taking:
            if self._left_out.pop(server, None) is not None:
                rank_zero_info(f"vLLM: {server.url} has the policy's weights, and is used again")
        return bool(has_them or self._taking)

    def _send(self, update: Update, stream: Iterator[PolicyWeight], model: ServedModel) -> None:
        """Send weights to all servers at once. All use the same memory: each waits until all servers have the one before."""
        by_nccl = any(server.facts.backend == "nccl" for server in self._taking)
        memory = torch.empty(update.largest, dtype=model.dtype, device=model.device if by_nccl else "cpu")
        sent: dict[Server, Future[None]] = {}
        for weight in stream:
            self._settle(sent, 2 * self.timeout)
            if not self._taking:
                return
            value = memory[: weight.shape.numel()].view(weight.shape)
            weight.write_rows(value, 0)
            sent = self._in_threads(self._taking, partial(self._give, value))
        self._settle(sent, 2 * self.timeout)

    def _prepare(self, update: Update, model: ServedModel, keeps_requests: bool, server: Server) -> None:
        server.pause(keeps=keeps_requests)
        server.set_label(_UPDATING)
        if server not in self._transfers or update.everything:
            self._transfers[server] = self._connected(server, model)
        if server not in self._taking:  # the update continued without it
            self._disconnect(server)
            return
        self._transfers[server].begin(update)

    def _give(self, value: Tensor, server: Server) -> None:
        self._transfers[server].give(value)

    def _finish(self, update: Update, label: str, server: Server) -> None:
        self._transfers[server].end()
        server.use_adapter(self._transfers[server].folder if update.adapter else None)
        server.reset_prefix_cache()
        if server in self._taking:
            server.set_label(label)
            server.resume()

    def _settle(self, asked: dict[Server, "Future[None]"], limit: float) -> None:
        """Wait for a step of an update on all servers; servers that fail, or exceed the limit, are left out of the update."""
        wait(asked.values(), limit)
        for server, answer in asked.items():
            failure = answer.exception() if answer.done() else RolloutError(f"it has hung in the update for {limit:.0f} s")
            if failure is None:
                continue
            self._taking.remove(server)
            self._disconnect(server)
            if isinstance(failure, ServerError) and failure.is_final:
                self._refusing.add(server)
            named = "" if isinstance(failure, RolloutError) else f"{type(failure).__name__}: "  # of gloo, NCCL or vLLM
            self._leave_out(server, named + one_line(failure, 600))
            for dispatch in self._running:
                dispatch.leave(server)

    def _connected(self, server: Server, model: ServedModel) -> Transfer:
        """Connect to a server that may have been restarted, perhaps with another model."""
        self._disconnect(server)
        server.forget()
        try:
            check_server(server, model, self.max_new_tokens, self.sends_adapter)
        except ConfigError as error:
            self._refusing.add(server)
            raise RolloutError(str(error)) from error
        server.shutdown_weight_transfer_engine()
        kind = GlooTransfer if server.facts.backend == BACKEND else NcclTransfer
        transfer: Transfer = kind(server, self.address or local_address(server.url), self.timeout, model)
        transfer.connect()
        return transfer

    def _labels(self) -> dict[Server, str]:
        """Labels of the weights of all usable servers."""
        # A hanging server gets the long limit only once.
        first = min(_FIRST_S, self.give_up_after)
        labels = self._of_each(self._servers, lambda server: server.label(_AGAIN_S if server in self._left_out else first))
        for server, found in labels.items():
            if not isinstance(found, str):
                self._refusing.discard(server)
                self._leave_out(server, str(found))
        return {s: label for s, label in labels.items() if isinstance(label, str) and s not in self._refusing}

    def _leave_out(self, server: Server, why: str) -> None:
        if server not in self._left_out:
            rank_zero_warn(f"vLLM: {server.url} did not take the policy's weights, and is left out: {why}")
        self._left_out[server] = why

    def _disconnect(self, server: Server) -> None:
        if transfer := self._transfers.pop(server, None):
            transfer.close()

    # ---- attempts

    def _attempts(self) -> Iterator[None]:
        """Attempts in growing intervals, until the caller needs no more.

        Raises:
            RolloutError: If none has succeeded `give_up_after` seconds after servers were found to fail, or if none can succeed.
        """
        for number in itertools.count():
            began = time.monotonic()
            yield
            left = self._outage.left(self._why(), began)
            if left <= 0 or self._refusing.issuperset(self._servers):
                raise RolloutError(
                    f"no vLLM server takes the policy's weights (tried for {self.give_up_after - left:.0f} s): {self._why()}; "
                    "restart the servers with the policy's model"
                )
            time.sleep(min(left, _LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(number, 16)))

    def _why(self) -> str:
        return "; ".join(why if server.url in why else f"{server.url}: {why}" for server, why in self._left_out.items())

    def _in_threads(self, servers: Iterable[Server], call: Callable[[Server], _T]) -> dict[Server, "Future[_T]"]:
        return {server: in_thread(partial(call, server), REQUEST) for server in servers}

    def _of_each(
        self, servers: Iterable[Server], call: Callable[[Server], _T], limit: float | None = None
    ) -> dict[Server, _T | BaseException]:
        """Make one request to all servers at once; an error becomes the answer, and a server that exceeds the limit has none."""
        answers = self._in_threads(servers, call)
        done = wait(answers.values(), limit).done
        return {server: answer.exception() or answer.result() for server, answer in answers.items() if answer in done}

    # ---- completions

    def play(
        self,
        runner: "ModelRunner",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        episodes: Sequence[Playable],
        capacity: int | None = None,
        around: Surroundings = NOTHING,
    ) -> Begun[None]:
        """See `RolloutEngine`. The G completions of a prompt are one request, the messages of episodes each their own.

        Raises:
            RolloutError: If an earlier update has failed, so that no server has known weights.
        """
        if self.version is None:
            raise RolloutError(
                f"no vLLM server has the policy's weights: {self._why() or 'none has received them'}; restart the servers"
            )
        self._of_each([server for server in self._servers if not server.is_known], lambda server: server.facts, _AGAIN_S)
        samples = request.samples_per_prompt if capacity is None else 1
        dispatch = Dispatch(self._servers, str(self.version), _UPDATING, samples, self.timeout, self._outage, self._idle)
        self._dispatches = [*self._running, dispatch]
        asking = Asking(self, dispatch, runner, tokenizer, request, capacity)

        def progress(live: int) -> None:
            if request.on_token is not None:
                request.on_token(live, self.max_new_tokens * (len(episodes) - live) // len(episodes))

        return AtOnce(episodes, asking.ask, around, dispatch.end).begin(progress)

    def take_idle_seconds(self) -> float:
        """See `WeightedEngine`."""
        return self._idle.take()

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> "Future[list[PromptLogprobs]]":
        """Begin to compute log-probabilities of sequences, on all servers that have the policy's weights."""
        servers = [server for server in self._servers if server not in self._left_out]

        def of_all() -> list[PromptLogprobs]:
            found = []
            for server, answer in self._of_each(servers, lambda server: server.prompt_logprobs(token_ids)).items():
                if isinstance(answer, tuple):
                    labels, logprobs = answer
                    in_float32 = server.is_known and server.facts.in_float32
                    found.append(PromptLogprobs(server.url, one_version(labels), logprobs, in_float32))
                elif isinstance(answer, ServerError) and answer.is_final:  # completions will show any other error
                    rank_zero_warn(f"vLLM: {answer}; its agreement with the policy is not checked")
            return found

        return in_thread(of_all, REQUEST)

    def shut_down(self) -> None:
        """End requests and close the connections; the servers keep running, and another run may use them."""
        for dispatch in self._dispatches:
            dispatch.end()
        for dispatch in self._dispatches:
            dispatch.wait()
        connected = list(self._transfers)
        for server in connected:
            self._disconnect(server)
        self._of_each(connected, lambda server: server.shutdown_weight_transfer_engine(limit=2.0), limit=5.0)
        self.version = None
        self._outage = Outage(self.give_up_after)  # without a word: no server has answered


class Asking:
    """Asks the servers for the messages of a rollout's episodes."""

    def __init__(
        self,
        sampler: VLLMServerSampler,
        dispatch: Dispatch,
        runner: "ModelRunner",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        capacity: int | None,
    ) -> None:
        self._sampler, self._dispatch, self._tokenizer, self._capacity = sampler, dispatch, tokenizer, capacity
        self._samples, self._greedy, self._draws = request.samples_per_prompt, request.greedy, prompt_draws(request)
        self._stop_ids = (request.stops or sampler.stops(tokenizer)).ids
        self._config, self._vocabulary = getattr(runner.model, "config", None), vocabulary_of(runner)
        self._together: dict[int, list[tuple[MessageRequest, asyncio.Future[Answer]]]] = {}  # by prompt

    async def ask(self, asked: MessageRequest) -> Sampled:
        """Ask for a message."""
        if not asked.number:
            self._sampler.check_prompt(self._config, len(asked.ids), asked.capacity or self._capacity)
        answer = await (self._alone(asked) if self._capacity is not None else self._with_others(asked))
        check_answer(answer, self._vocabulary)
        decoded = self._sampler.completions(self._tokenizer, [asked.ids], [answer.tokens], [answer.finished], asked.stop)
        return Sampled(list(answer.tokens), list(answer.logprobs), steps_of(answer), decoded[0])

    async def _alone(self, asked: MessageRequest) -> Answer:
        return (await self._answers(asked, 1))[0]

    async def _with_others(self, asked: MessageRequest) -> Answer:
        """The answer to one of the G requests that the completions of a prompt make together."""
        loop, prompt = asyncio.get_running_loop(), asked.episode // self._samples
        answer: asyncio.Future[Answer] = loop.create_future()
        self._together.setdefault(prompt, []).append((asked, answer))
        if len(self._together[prompt]) == self._samples:
            group = self._together.pop(prompt)
            for (_, each), found in zip(group, await self._answers(group[0][0], self._samples), strict=True):
                if not each.done():
                    each.set_result(found)
        return await answer

    async def _answers(self, asked: MessageRequest, samples: int) -> list[Answer]:
        seed = self._draws.seed_of(asked.episode, asked.number)
        parameters = self._sampler.parameters(self._stop_ids, samples, seed, self._greedy, asked.limit, asked.stop)
        return await asyncio.wrap_future(self._dispatch.submit(asked.ids, parameters))

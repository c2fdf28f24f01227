"""`Server`: one vLLM server: its description, its requests, its completions and its weights.

It uses two parts of the server's interface. `/inference/v1/generate`, token ids in and out, exists with `--enable-scale-out`. The
paths for training (`/weight_info`, `/pause`, `/init_weight_transfer_engine` and so on) exist with VLLM_SERVER_DEV_MODE=1.
"""

import asyncio
import contextlib
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.errors import RolloutError, shorten
from hybrid_lightning.rollout.vllm import MISSING, NO_LORA
from hybrid_lightning.rollout.vllm.completing import PROMPT_LOGPROBS, Answer

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 10.0
_SHORT_S = 30.0  # for requests that a server answers between two steps of its engine
_PAUSE_S = 120.0  # for a server to stop its engine
_OVERDUE_S = 10.0  # after which an answer to these paths, which take a moment, is reported as overdue
_PROMPT = frozenset(("/version", "/weight_info", "/update_weight_version", "/pause", "/resume"))
_T = TypeVar("_T")


@dataclass(frozen=True)
class ServerFacts:
    """Properties of a server."""

    model: str
    context: int  # tokens
    sequences: int  # completed at once
    dtype: str
    logprobs_mode: str
    backend: str | None  # its weight transfer backend
    workers: int
    on_cpu: bool
    splits_prompts_on_cpu: bool
    max_lora_rank: int  # 0: no LoRA
    lora_anywhere: bool  # even at the output layer
    reads_weights: bool  # from files, when the server starts
    in_float32: bool  # see `PromptLogprobs`

    @classmethod
    def of(cls, config: Mapping[str, Any], names: Mapping[str, Any], size: Mapping[str, Any]) -> Self:
        """Read them from vLLM's config, and from the answers to /v1/models and /get_world_size.

        Raises:
            KeyError: If something is missing. Other errors are raised if it has an unexpected type.
        """
        model, scheduler, transfer = config["model_config"], config["scheduler_config"], config.get("weight_transfer_config")
        lora = config.get("lora_config") or {}
        on_cpu = "cpu" in (config.get("device_config") or {}).values()
        dtype, cached = str(model["dtype"]).removeprefix("torch."), (config.get("cache_config") or {}).get("cache_dtype")
        return cls(
            str(names["data"][0]["id"]),
            int(model["max_model_len"]),
            int(scheduler["max_num_seqs"]),
            dtype,
            str(model["logprobs_mode"]),
            None if transfer is None else str(transfer["backend"]),
            int(size["world_size"]),
            on_cpu,
            on_cpu and bool(scheduler.get("enable_chunked_prefill")),
            int(lora.get("max_lora_rank", 0)),
            lora.get("target_modules") is None,
            (config.get("load_config") or {}).get("load_format") != "dummy",
            dtype == "float32" and not model.get("quantization") and cached in (None, "auto", "float32"),
        )


class ServerError(RolloutError):
    """A server does not answer, or refuses; the message has the cause in one line, and without a status there was no answer."""

    def __init__(self, url: str, cause: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {cause}")
        self.cause, self.status = cause, status

    @property
    def is_final(self) -> bool:
        """Whether the same request would be refused again."""
        wrong = self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)
        return wrong or self.cause.startswith(("another model", MISSING, NO_LORA))


class Server:
    """A vLLM server at an address such as http://node7:8000, with an API key if it requires one.

    A request may take `timeout` seconds.
    """

    def __init__(self, url: str, timeout: float, key: str | None) -> None:
        self.url, self.timeout = url, timeout
        self.adapter: str | None = None  # LoRA of the completions, named after its folder; None: no LoRA
        self._known: str | None = None  # the LoRA that was last loaded into it
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._facts: ServerFacts | None = None

    @property
    def facts(self) -> ServerFacts:
        """Properties of the server; requested once."""
        if self._facts is None:
            # On first use the server inspects its whole environment, which takes seconds.
            info = self.request("GET", "/server_info", params={"config_format": "json"}, limit=2 * _SHORT_S)
            names, size = self.request("GET", "/v1/models"), self.request("GET", "/get_world_size")
            try:
                self._facts = ServerFacts.of(info["vllm_config"], names, size)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                cause = f"its answer to /server_info has no {error}: this version of vLLM is not supported"
                raise ServerError(self.url, cause) from error
        return self._facts

    @property
    def is_known(self) -> bool:
        """Whether `facts` have been requested."""
        return self._facts is not None

    def forget(self) -> None:
        """Request `facts` again when they are needed: the server may have been restarted."""
        self._facts = None

    # ---- weights

    def label(self, limit: float = _SHORT_S) -> str:
        """Label of its weights, as last set."""
        return self._label(self.request("GET", "/weight_info", limit=limit))

    def set_label(self, label: str) -> None:
        """Set the label of its weights."""
        self.request("POST", "/update_weight_version", {"new_version": label})

    def pause(self, keeps: bool) -> None:
        """Begin no more requests; keep the open ones for `resume`, or end them."""
        self.request("POST", "/pause", params={"mode": "keep" if keeps else "abort"}, limit=min(_PAUSE_S, self.timeout))

    def resume(self) -> None:
        """Begin requests again."""
        self.request("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Drop results computed with other weights; open requests that are kept read their tokens again."""
        answer = self.request("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"}, limit=self.timeout)
        if answer is not None and not answer.get("success", True):
            raise ServerError(self.url, "it did not drop results computed with earlier weights")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make its workers connect to the sender."""
        self._after_a_stop("/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self, limit: float = _SHORT_S) -> None:
        """Make its workers close their connection."""
        self._after_a_stop("/shutdown_weight_transfer_engine", limit=limit)

    def start_weight_update(self) -> None:
        """Prepare it to receive weights."""
        self._after_a_stop("/start_weight_update")

    def update_weights(self, update_info: Any, limit: float) -> None:
        """Make it receive weights."""
        self.request("POST", "/update_weights", {"update_info": update_info}, limit=limit)

    def finish_weight_update(self) -> None:
        """Make it use the received weights."""
        self.request("POST", "/finish_weight_update", {}, limit=self.timeout)

    def use_adapter(self, folder: str | None) -> None:
        """Complete from here on with LoRA that its workers read from a folder, or without."""
        if folder is not None and folder != self._known:
            self.request("POST", "/v1/load_lora_adapter", {"lora_name": folder, "lora_path": folder}, limit=self.timeout)
            self._known = folder
        self.adapter = folder

    def _after_a_stop(self, path: str, body: Any = None, limit: float | None = None) -> None:
        """Make a request. If an update is still open, because its sender was stopped, finish it and repeat the request."""
        try:
            self.request("POST", path, body, limit=limit or self.timeout)
        except ServerError as error:
            if "already active" not in error.cause and "during a weight update" not in error.cause:
                raise
            self.finish_weight_update()
            self.request("POST", path, body, limit=limit or self.timeout)

    # ---- completions

    async def complete(
        self, client: "httpx.AsyncClient", name: str, ids: Sequence[int], parameters: dict[str, Any]
    ) -> list[Answer]:
        """Complete a prompt of these token ids, with a request that can be ended by its name.

        Raises:
            ServerError: If it does not complete the prompt, or was instructed to end the request.
        """
        body = {"request_id": name, "token_ids": list(ids), "sampling_params": parameters, "model": self.adapter}
        content = await self._ask(client, "POST", "/inference/v1/generate", body)
        try:
            choices = sorted(content["choices"], key=lambda choice: int(choice["index"]))
            reasons = {choice["finish_reason"] for choice in choices}
            if not reasons <= {"stop", "length"} or len(choices) != parameters["n"]:
                raise ServerError(self.url, f"it ended completions with {sorted(map(str, reasons))}: it was paused")
            return [_answer(choice, parameters["max_tokens"]) for choice in choices]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(self.url, f"its completions cannot be read ({type(error).__name__}: {error})") from error

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> tuple[set[str], list[list[float]]]:
        """The label of its weights, and the log-probabilities of each sequence's tokens except the first.

        Raises:
            ServerError: If it does not answer, or cannot compute them.
        """

        async def of_all(client: "httpx.AsyncClient") -> list[Any]:
            common = {"sampling_params": PROMPT_LOGPROBS, "model": self.adapter}
            bodies = [{"token_ids": list(ids), **common} for ids in token_ids]
            return await asyncio.gather(*(self._ask(client, "POST", "/inference/v1/generate", body) for body in bodies))

        answers = self._within(self.timeout, of_all)
        try:
            labels = {str(span["version"]) for answer in answers for span in answer["choices"][0]["weight_versions"]}
            rows = [zip(ids, answer["prompt_logprobs"], strict=True) for ids, answer in zip(token_ids, answers, strict=True)]
            return labels, [[float(entry[str(token)]["logprob"]) for token, entry in [*row][1:]] for row in rows]
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(self.url, f"its log-probabilities of prompts cannot be read ({error})", 422) from error

    async def end(self, client: "httpx.AsyncClient", names: Sequence[str]) -> None:
        """End requests, if the server still answers."""
        with contextlib.suppress(ServerError):  # the server ends them itself when their connections are closed
            ids = [f"generate-tokens-{name}" for name in names]  # as vLLM calls them
            await self._ask(client, "POST", "/inference/v1/abort_requests", {"request_ids": ids})

    async def label_now(self, client: "httpx.AsyncClient") -> str:
        """The label of its weights, requested in parallel with other requests."""
        return self._label(await self._ask(client, "GET", "/weight_info"))

    def _label(self, answer: Any) -> str:
        try:
            return str(answer["weight_version"])
        except (LookupError, TypeError) as error:
            raise ServerError(self.url, f"its answer to /weight_info has no version: {shorten(answer)}") from error

    def connections(self) -> "httpx.AsyncClient":
        """Connections to this server and others like it; each request limits its own time."""
        import httpx  # here and below: it takes 3 MB of runs without a server

        return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=_CONNECT_S), **self._options)

    # ---- requests

    @cached_property
    def _options(self) -> dict[str, Any]:
        import httpx

        return {
            "trust_env": False,  # ignore the environment's proxy: weights go directly to a server, too
            "verify": ssl.create_default_context() if self.url.startswith("https") else False,
            # No connection is used twice: a server may have closed it in the meantime, as vLLM's does after an error.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
        }

    def request(
        self, method: str, path: str, body: Any = None, *, params: dict[str, str] | None = None, limit: float = _SHORT_S
    ) -> Any:
        """Make a GET or POST request, which may take `limit` seconds; returns the JSON of its answer, None if that is empty.

        Raises:
            ServerError: If it does not answer, or refuses.
        """
        limit = min(limit, self.timeout) if limit <= _SHORT_S else limit
        return self._within(limit, lambda client: self._ask(client, method, path, body, params))

    async def _ask(
        self, client: "httpx.AsyncClient", method: str, path: str, body: Any = None, params: dict[str, str] | None = None
    ) -> Any:
        import httpx

        overdue = asyncio.get_running_loop().call_later(_OVERDUE_S, self._report_overdue) if path in _PROMPT else None
        try:
            return self._content(
                await client.request(method, f"{self.url}{path}", json=body, params=params, headers=self._headers)
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerError(self.url, f"nothing answers there ({str(error) or 'no connection'})") from error
        except httpx.HTTPError as error:
            raise ServerError(self.url, f"the connection broke ({str(error) or type(error).__name__})") from error
        finally:
            if overdue is not None:
                overdue.cancel()

    def _report_overdue(self) -> None:
        late = f"an answer of {self.url} is overdue: none for {_OVERDUE_S:g} s"
        rank_zero_info(f"vLLM: {late}; it hangs or is overloaded, and is waited for")

    def _within(self, limit: float, answer: "Callable[[httpx.AsyncClient], Awaitable[_T]]") -> _T:
        """The answer, if it arrives completely within this many seconds."""

        async def limited() -> _T:
            async with asyncio.timeout(limit), self.connections() as client:
                return await answer(client)

        try:
            return asyncio.run(limited())
        except TimeoutError as error:
            raise ServerError(self.url, f"no answer within {limit:g} s; it hangs or is overloaded") from error

    def _content(self, response: "httpx.Response") -> Any:
        if response.is_success:
            try:
                is_text = response.content.startswith(b"Success")  # vLLM's answer for adapters
                return response.json() if response.content and not is_text else None
            except ValueError as error:
                raise ServerError(self.url, f"{response.request.url.path}: not JSON, so this is not vLLM", 404) from error
        cause = _cause(response)
        if response.status_code in (401, 403):
            cause = f"it requires an API key ({cause}); set the same VLLM_API_KEY here and there"
        elif response.status_code == 404 or not cause:
            cause = f"{response.request.url.path}: {response.status_code} {cause}".rstrip()
        raise ServerError(self.url, cause, response.status_code)


def _answer(choice: dict[str, Any], longest: int) -> Answer:
    """A completion of at most `longest` tokens.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: If the choice is not a completion.
    """
    tokens = [int(token) for token in choice["token_ids"]]
    logprobs = [float(entry["logprob"]) for entry in (choice["logprobs"] or {}).get("content") or ()]
    if not 0 < len(tokens) <= longest:
        raise ValueError(f"{len(tokens)} tokens instead of 1 to {longest}")
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("a log-probability is not finite")
    versions = [(str(span["version"]), int(span["start"])) for span in choice.get("weight_versions") or ()] or [("unknown", 0)]
    starts = [start for _, start in versions]
    if starts[0] != 0 or starts != sorted(starts):
        raise ValueError(f"its versions begin at {starts}")
    return Answer(tokens, logprobs, choice["finish_reason"] == "stop", versions)


def _cause(response: "httpx.Response") -> str:
    """The error that a server reports, in a line."""
    try:
        content = response.json()
        error = content.get("error", content.get("detail", content))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    worker = re.search(r"Worker failed with error ['\"](.*)['\"], please check", text, re.DOTALL)
    return " ".join((worker[1] if worker else text).split())[:400]

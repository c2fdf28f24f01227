"""`Endpoint`: the policy as an OpenAI-compatible endpoint in this process, for the agents of a run.

It runs on the event loop of `user_calls`, like the agents that are coroutines, which reach it without a socket. A key names an
episode: it is random, and ends with the episode.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from hybrid_lightning.agents.agent import HERE, Agent
from hybrid_lightning.agents.dialects import DIALECTS, ChatAnswer, ChatRequest, Dialect, RefusedError
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.user_calls import begin_async, is_shared

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)
MAX_BODY = 16 * 2**20  # bytes of a request
_IN_PROCESS = "in-process"  # in place of a client's address
# Arguments of a client's request that need nothing of HTTP.
_SIMPLE = {"model", "messages", "tools", "tool_choice", "stop", "max_tokens", "max_completion_tokens", "n", "logprobs"} | {
    *("temperature", "top_p", "seed", "response_format", "frequency_penalty", "presence_penalty", "parallel_tool_calls")
}
_IDLE_S = 3_600  # seconds for which a connection is kept: training may take long between two requests
_REMEDIES = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), "set model.sampler.{name} for all messages"),
    "seed": "set model.seed for the run",
    "tool_choice": "let the reward pay for calls",
    "response_format": "let the reward pay for the format",
}


class Conversing(Protocol):
    """An episode that answers an agent's requests."""

    async def complete(self, asked: ChatRequest) -> ChatAnswer:
        """The policy's next message; RefusedError if the request is refused."""


def check_installed() -> None:
    """Raise ConfigError unless the packages of the extra `agents` are installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"model.agent needs {' and '.join(missing)}; run pip install 'hybrid-lightning[agents]'")


class Endpoint:
    """The endpoint of this process.

    Args:
        agent: Says where it listens.
        place: Number of this process on its machine, added to the port.

    Raises:
        ConfigError: If a package is missing, or the address cannot be used.
    """

    def __init__(self, agent: Agent, place: int = 0) -> None:
        check_installed()
        self._secret, self._count = secrets.token_bytes(32), 0
        self._live: dict[str, tuple[Conversing, set[asyncio.Task[Any]]]] = {}  # by key
        self._warned: set[str] = set()
        self._server: Any = None
        self._client: Any = None
        self._host = agent.host
        port = agent.port + place if agent.port else 0
        try:
            family, *_, address = socket.getaddrinfo(agent.host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
        except OSError as error:
            raise ConfigError(
                f"agent.host={agent.host!r} with port {port}: {error.strerror or error}; give an address of this machine, and a "
                "free port or 0"
            ) from error
        self.port = int(self._socket.getsockname()[1])
        self.app = self._made_app()

    @property
    def base_url(self) -> str:
        """Address for clients on this machine."""
        host = HERE if self._host in ("0.0.0.0", "::", "localhost") else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    async def start(self) -> None:
        """Begin to listen, unless it does already; on the event loop of `user_calls`."""
        if self._server is None:
            import uvicorn

            options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
            config = uvicorn.Config(self.app, timeout_keep_alive=_IDLE_S, **options)
            self._server = uvicorn.Server(config)
            self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
            while not self._server.started and not self._serving.done():
                await asyncio.sleep(0.005)

    def stop(self) -> None:
        """End it."""

        async def stop() -> None:
            if self._client is not None:
                with suppress(Exception):
                    await self._client.close()
            if self._server is not None:
                self._server.should_exit = self._server.force_exit = True
                with suppress(Exception):
                    await asyncio.wait_for(self._serving, 2.0)

        if self._server is None or is_shared(self._serving.get_loop()):
            with suppress(Exception):
                begin_async(stop()).result(5.0)
        self._socket.close()

    # ---- keys

    def open(self, episode: Conversing) -> str:
        """A new key for an episode."""
        self._count += 1
        key = f"hl-{self._count}-{self._signature(str(self._count))}"
        self._live[key] = episode, set()
        return key

    def close(self, key: str) -> None:
        """End a key, and what is being answered for it."""
        _, tasks = self._live.pop(key)
        for task in tasks:
            task.cancel()

    def _signature(self, number: str) -> str:
        return hmac.new(self._secret, number.encode(), hashlib.sha256).hexdigest()

    def _episode(self, headers: Mapping[str, str]) -> tuple[Conversing, set[asyncio.Task[Any]]]:
        kind, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if key in self._live:
            return self._live[key]
        _, _, rest = key.partition("-")
        number, _, signature = rest.partition("-")
        if hmac.compare_digest(self._signature(number).encode(), signature.encode()):
            raise RefusedError("the episode of this key has ended", 410, "episode_ended")
        raise RefusedError("the key is unknown; give the api_key of the row as a bearer token", 401, "invalid_api_key")

    # ---- clients

    def client(self, key: str, is_async: bool) -> Any:
        """A client of the package `openai` for a key; None without the package."""
        if find_spec("openai") is None:
            return None
        import openai

        if not is_async:
            return openai.OpenAI(base_url=self.base_url, api_key=key, timeout=None)
        if self._client is None:
            # The package has its own choice of an HTTP library.
            kind = next(base for base in openai.DefaultAsyncHttpxClient.__mro__ if base.__name__ == "AsyncClient")
            library = __import__(kind.__module__.partition(".")[0])
            transport = library.ASGITransport(self.app, client=(_IN_PROCESS, 0))
            self._client = openai.AsyncOpenAI(
                base_url=self.base_url, api_key=key, timeout=None, http_client=library.AsyncClient(transport=transport)
            )
        client = self._client.with_options(api_key=key)
        completions = client.chat.completions
        completions.create = self._shortcut(key, completions.create)
        return client

    def _shortcut(self, key: str, create: Any) -> Any:
        """A client's `chat.completions.create` for simple requests, without the package's way through HTTP.

        That way takes half a millisecond: for short messages, longer than sampling them.
        """
        import openai
        from openai.types.chat import ChatCompletion

        dialect, url = DIALECTS["/v1/chat/completions"], f"{self.base_url}/chat/completions"

        async def direct(**given: Any) -> Any:
            if not _SIMPLE.issuperset(given):
                return await create(**given)
            body = {name: _plain(value) for name, value in given.items() if not isinstance(value, (openai.Omit, openai.NotGiven))}
            try:
                asked, answer = await self._answered({"x-api-key": key}, dialect, body)
            except RefusedError as refused:
                kinds = {400: openai.BadRequestError, 503: openai.InternalServerError}
                error, library = dialect.error(refused), __import__(type(self._client._client).__module__.partition(".")[0])
                response = library.Response(refused.status, json=error, request=library.Request("POST", url))
                raise kinds.get(refused.status, openai.APIStatusError)(
                    f"Error code: {refused.status} - {error}", response=response, body=error["error"]
                ) from None
            return ChatCompletion.model_validate(dialect.write(asked, answer))

        return direct

    # ---- requests

    def _made_app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def models(request: "Request") -> "Response":
            try:
                self._episode(request.headers)
            except RefusedError as refused:
                return self._refusal(DIALECTS["/v1/chat/completions"], refused)
            entry = {"id": "policy", "object": "model", "created": 0, "owned_by": "hybrid_lightning"}
            return JSONResponse({"object": "list", "data": [entry]})

        async def missing(request: "Request", error: Exception) -> "Response":
            known = ", ".join([*DIALECTS, "/v1/models"])
            refused = RefusedError(f"there is no {request.method} {request.url.path}; there are {known}", 404, "not_found")
            return self._refusal(DIALECTS["/v1/chat/completions"], refused)

        routes = [Route(path, self._answering(dialect), methods=["POST"]) for path, dialect in DIALECTS.items()]
        handlers: Any = {404: missing, 405: missing}
        return Starlette(routes=[*routes, Route("/v1/models", models, methods=["GET"])], exception_handlers=handlers)

    def _answering(self, dialect: Dialect) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        async def answer(request: "Request") -> "Response":
            try:
                self._episode(request.headers)  # before its body is read
                asked, found = await self._answered(request.headers, dialect, await _body(request), request)
            except RefusedError as refused:
                return self._refusal(dialect, refused)
            except RecursionError:
                return self._refusal(dialect, RefusedError("the request is nested too deeply"))
            if asked.stream:
                return StreamingResponse(_events(dialect, asked, found), media_type="text/event-stream")
            return JSONResponse(dialect.write(asked, found))

        return answer

    async def _answered(
        self, headers: Mapping[str, str], dialect: Dialect, body: Mapping[str, Any], request: "Request | None" = None
    ) -> tuple[ChatRequest, ChatAnswer]:
        """A body as a request, and its answer; a request over a socket ends with its connection."""
        episode, tasks = self._episode(headers)
        asked = dialect.read(body)
        self._warn_of(asked)
        task = asyncio.create_task(episode.complete(asked))
        tasks.add(task)
        try:
            return asked, await (task if request is None else _unless_gone(request, task))
        except asyncio.CancelledError:
            if not task.cancelled() or asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            raise RefusedError("the episode of this key has ended", 410, "episode_ended") from None
        finally:
            tasks.discard(task)
            task.cancel()

    def _refusal(self, dialect: Dialect, refused: RefusedError) -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse(dialect.error(refused), refused.status)

    def _warn_of(self, asked: ChatRequest) -> None:
        for name in asked.ignored:
            if name not in self._warned:
                self._warned.add(name)
                remedy = _REMEDIES.get(name, "leave it out").format(name=name)
                logger.warning(
                    "%s",
                    f"the agent asks with {name}, which would change the distribution that is trained on, so it is not obeyed; "
                    f"{remedy}",
                )


def _plain(value: Any) -> Any:
    """An argument of a client as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json", exclude_unset=True) if hasattr(value, "model_dump") else value


async def _body(request: "Request") -> Mapping[str, Any]:
    """A request's body, a JSON object of at most `MAX_BODY` bytes."""
    parts, left, told = [], MAX_BODY, request.headers.get("content-length", "0")
    if told.isdigit() and int(told) <= MAX_BODY:
        async for part in request.stream():
            parts.append(part)
            left -= len(part)
            if left < 0:
                break
    elif told.isdigit():
        left = -1
    if left < 0:
        raise RefusedError(f"the request has more than {MAX_BODY // 2**20} MiB; send less", 413, "request_too_large")
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the request's body is not JSON: {error}") from error
    if not isinstance(body, Mapping):
        raise RefusedError("the request's body is not a JSON object")
    return body


async def _unless_gone(request: "Request", task: asyncio.Task[ChatAnswer]) -> ChatAnswer:
    """A task's result, unless the client closes its connection first."""
    if request.client is not None and request.client.host == _IN_PROCESS:
        return await task
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError("the client has closed the connection", 499)
        return await task
    finally:
        gone.cancel()


async def _disconnected(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(dialect: Dialect, asked: ChatRequest, answer: ChatAnswer) -> AsyncIterator[str]:
    for name, data in dialect.events(asked, answer):
        text = data if isinstance(data, str) else json.dumps(data)
        yield f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"

"""What clients send to the endpoint, and what they expect: chat completions and responses of OpenAI, messages of Anthropic.

A dialect reads a body as a `ChatRequest`, and writes a `ChatAnswer` as JSON or, for `stream: true`, as events: a replay of the
finished answer. The names follow the references of these interfaces (platform.openai.com/docs/api-reference,
docs.anthropic.com/en/api/messages), and what real packages send.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybrid_lightning.errors import shorten
from hybrid_lightning.types import Message

_CREATED = 0  # time of every answer: equal requests of a run that is repeated get equal answers


class RefusedError(Exception):
    """A request is refused; the client gets the message, which ends with a remedy where there is one."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class ToolCall(NamedTuple):
    """A call of a tool."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class ChatRequest:
    """A request for the policy's next message."""

    messages: list[Message]  # as `plain_message` makes them
    tools: list[dict[str, Any]] = field(default_factory=list)  # as chat completions have them
    calls: bool = True  # whether the policy may call them
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    stream: bool = False
    logprobs: bool = False
    model: str = "policy"
    ignored: tuple[str, ...] = ()  # options that would change the distribution
    stream_usage: bool = False  # whether a stream ends with the numbers of tokens


@dataclass(frozen=True)
class ChatAnswer:
    """The policy's message."""

    id: str  # unique in its episode
    text: str
    calls: Sequence[ToolCall]
    cut: bool  # whether a limit of tokens ended it
    prompt_tokens: int
    logprobs: Sequence[tuple[str, float]]  # text and log-probability of each token
    version: str  # of the weights that sampled it

    @property
    def finish(self) -> str:
        """OpenAI's reason for its end."""
        return "tool_calls" if self.calls else "length" if self.cut else "stop"


Events = Iterator[tuple[str, Any]]  # name and data


class Dialect(ABC):
    """A way of asking for messages."""

    @abstractmethod
    def read(self, body: Mapping[str, Any]) -> ChatRequest:
        """Read a request's body; RefusedError if it is malformed or asks for something that there is not."""

    @abstractmethod
    def write(self, asked: ChatRequest, answer: ChatAnswer) -> dict[str, Any]:
        """The answer as JSON."""

    @abstractmethod
    def events(self, asked: ChatRequest, answer: ChatAnswer) -> Events:
        """The answer as a stream."""

    def error(self, refused: RefusedError) -> dict[str, Any]:
        """An error as JSON."""
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        return {"error": {"message": refused.message, "type": kind, "param": None, "code": refused.code}}


def plain_message(message: Any) -> Message:
    """A message with a role, its content as one text and, for calls, `calls`; `developer` counts as `system`.

    Raises:
        RefusedError: If it is malformed, or contains images or sound.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RefusedError(f"a message is {shorten(message, 80)}; it must be an object with a role and a content")
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    plain: dict[str, Any] = {"role": role, "content": text_of(message.get("content"))}
    if isinstance(message.get("name"), str):
        plain["name"] = message["name"]
    if isinstance(message.get("tool_call_id"), str):
        plain["tool_call_id"] = message["tool_call_id"]
    if role == "assistant" and message.get("tool_calls"):
        plain["calls"] = [_call(entry) for entry in _list(message["tool_calls"], "tool_calls")]
    return plain


def text_of(content: Any) -> str:
    """A content as text: a text, None, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.encode(errors="replace").decode()  # half a surrogate pair cannot be tokenized
    if not isinstance(content, list):
        raise RefusedError(f"a content is {shorten(content, 80)}; it must be text or a list of parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise RefusedError(f"a content has the part {shorten(part, 80)}; the policy reads only text")
        texts.append(text)
    return "".join(texts).encode(errors="replace").decode()


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RefusedError(f"{name} is {shorten(value, 80)}; it must be a list")
    return value


def _call(entry: Any) -> ToolCall:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RefusedError(f"tool_calls has {shorten(entry, 80)}; a call has an id and a function with a name and arguments")
    arguments = function.get("arguments") or "{}"
    return ToolCall(str(entry.get("id")), function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))


def _tool(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not name or not isinstance(parameters or {}, Mapping):
        raise RefusedError(f"tools has one named {shorten(name, 80)}; a tool has a name, and a JSON schema of its parameters")
    schema = {"type": "object", "properties": {}, **(parameters or {})}
    return {"type": "function", "function": {"name": name, "description": str(description or ""), "parameters": schema}}


def _number(body: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RefusedError(f"{name} is {shorten(value, 80)}; it must be a whole number of at least 1")
        return value
    return None


def _stop(value: Any, name: str = "stop") -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RefusedError(f"{name} is {shorten(value, 80)}; it must be a text, or a list of texts that are not empty")
    return tuple(dict.fromkeys(texts))


# Options that would change the distribution that is trained on, each with the value that changes nothing.
_CHANGING: dict[str, Any] = {
    **{"temperature": None, "top_p": None, "top_k": None, "min_p": None, "frequency_penalty": 0, "presence_penalty": 0},
    **{"repetition_penalty": 1, "logit_bias": {}, "seed": None, "best_of": 1},
}


def _ignored(body: Mapping[str, Any], forced: bool, formatted: bool) -> tuple[str, ...]:
    found = [name for name, neutral in _CHANGING.items() if body.get(name) not in (None, neutral)]
    return (*found, *(["tool_choice"] if forced else []), *(["response_format"] if formatted else []))


def _only_one(body: Mapping[str, Any]) -> None:
    if body.get("n") not in (None, 1):
        raise RefusedError(f"n is {shorten(body['n'], 80)}; a request gets one message, so ask several times")


class ChatCompletions(Dialect):
    """`/v1/chat/completions`."""

    def read(self, body: Mapping[str, Any]) -> ChatRequest:
        """See `Dialect`."""
        _only_one(body)
        messages = [plain_message(message) for message in _list(body.get("messages"), "messages")]
        tools = []
        for entry in _list(body.get("tools") or [], "tools"):
            function = entry.get("function") if isinstance(entry, Mapping) else None
            if not isinstance(function, Mapping):
                raise RefusedError(f"tools has {shorten(entry, 80)}; only functions can be called")
            tools.append(_tool(function.get("name"), function.get("description"), function.get("parameters")))
        choice, form, streams = body.get("tool_choice"), body.get("response_format"), body.get("stream_options")
        formatted = isinstance(form, Mapping) and form.get("type") != "text"
        return ChatRequest(
            messages,
            tools,
            choice != "none",
            _stop(body.get("stop")),
            _number(body, "max_completion_tokens", "max_tokens"),
            body.get("stream") is True,
            body.get("logprobs") is True,
            str(body.get("model") or "policy"),
            _ignored(body, choice not in (None, "auto", "none"), formatted),
            isinstance(streams, Mapping) and streams.get("include_usage") is True,
        )

    def write(self, asked: ChatRequest, answer: ChatAnswer) -> dict[str, Any]:
        """See `Dialect`."""
        message: dict[str, Any] = {"role": "assistant", "content": None if answer.calls else answer.text}
        if answer.calls:
            message["tool_calls"] = [_written(call) for call in answer.calls]
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": _logprobs(asked, answer)}
        return {**self._head(asked, answer, "chat.completion"), "choices": [choice], "usage": _usage(answer)}

    def events(self, asked: ChatRequest, answer: ChatAnswer) -> Events:
        """See `Dialect`."""
        head = self._head(asked, answer, "chat.completion.chunk")
        delta: dict[str, Any] = {"role": "assistant", "content": None if answer.calls else answer.text}
        if answer.calls:
            delta["tool_calls"] = [{"index": number, **_written(call)} for number, call in enumerate(answer.calls)]
        for number, (part, reason) in enumerate(((delta, None), ({}, answer.finish))):
            logprobs = None if number else _logprobs(asked, answer)
            yield "", {**head, "choices": [{"index": 0, "delta": part, "finish_reason": reason, "logprobs": logprobs}]}
        if asked.stream_usage:  # many clients read the first choice of every event
            yield "", {**head, "choices": [], "usage": _usage(answer)}
        yield "", "[DONE]"

    def _head(self, asked: ChatRequest, answer: ChatAnswer, kind: str) -> dict[str, Any]:
        named = {"id": f"chatcmpl-{answer.id}", "object": kind, "created": _CREATED, "model": asked.model}
        return {**named, "system_fingerprint": answer.version}


def _written(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _usage(answer: ChatAnswer) -> dict[str, int]:
    used = len(answer.logprobs)
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": used, "total_tokens": answer.prompt_tokens + used}


def _logprobs(asked: ChatRequest, answer: ChatAnswer) -> dict[str, Any] | None:
    if not asked.logprobs:
        return None
    tokens = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []} for text, logprob in answer.logprobs
    ]
    return {"content": tokens, "refusal": None}


class Responses(Dialect):
    """`/v1/responses`, as far as the default model of openai-agents needs it: without state on the server."""

    def read(self, body: Mapping[str, Any]) -> ChatRequest:
        """See `Dialect`."""
        for name in ("previous_response_id", "conversation", "prompt"):
            if body.get(name) is not None:
                raise RefusedError(f"{name} is not kept here; send the whole conversation as input")
        given = body.get("input")
        entries = [{"role": "user", "content": given}] if isinstance(given, str) else _list(given, "input")
        messages: list[Message] = [] if not body.get("instructions") else [_system(body["instructions"])]
        for entry in entries:
            self._add(messages, entry)
        tools = []
        for entry in _list(body.get("tools") or [], "tools"):
            if not isinstance(entry, Mapping) or entry.get("type") != "function":
                raise RefusedError(f"tools has {shorten(entry, 80)}; only functions can be called")
            tools.append(_tool(entry.get("name"), entry.get("description"), entry.get("parameters")))
        choice, text = body.get("tool_choice"), body.get("text")
        form = text.get("format") if isinstance(text, Mapping) else None
        formatted = isinstance(form, Mapping) and form.get("type") != "text"
        return ChatRequest(
            messages,
            tools,
            choice != "none",
            (),
            _number(body, "max_output_tokens"),
            body.get("stream") is True,
            False,
            str(body.get("model") or "policy"),
            _ignored(body, choice not in (None, "auto", "none"), formatted),
        )

    def _add(self, messages: list[Message], entry: Any) -> None:
        kind = entry.get("type", "message") if isinstance(entry, Mapping) else None
        if kind == "message":
            messages.append(plain_message(entry))
        elif kind == "function_call":
            call = _call({"id": entry.get("call_id"), "function": {key: entry.get(key) for key in ("name", "arguments")}})
            if messages and "calls" in messages[-1]:
                messages[-1] = {**messages[-1], "calls": [*messages[-1]["calls"], call]}
            else:
                messages.append({"role": "assistant", "content": "", "calls": [call]})
        elif kind == "function_call_output":
            result = {"role": "tool", "content": text_of(entry.get("output")), "tool_call_id": str(entry.get("call_id"))}
            messages.append(result)
        elif kind != "reasoning":
            raise RefusedError(f"input has {shorten(entry, 80)}; only messages and calls of functions are known here")

    def write(self, asked: ChatRequest, answer: ChatAnswer) -> dict[str, Any]:
        """See `Dialect`."""
        used, cut = len(answer.logprobs), answer.finish == "length"
        usage = {
            **{"input_tokens": answer.prompt_tokens, "output_tokens": used, "total_tokens": answer.prompt_tokens + used},
            **{"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
        }
        return {
            **{"id": f"resp_{answer.id}", "object": "response", "created_at": _CREATED, "model": asked.model},
            **{"status": "incomplete" if cut else "completed", "error": None, "instructions": None, "metadata": {}},
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            **{"output": self._items(answer), "usage": usage, "parallel_tool_calls": True},
            **{"tool_choice": "auto", "tools": [], "temperature": None, "top_p": None},
        }

    def _items(self, answer: ChatAnswer) -> list[dict[str, Any]]:
        if answer.calls:
            return [
                {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id, "name": call.name, "status": "completed"}
                | {"arguments": call.arguments}
                for call in answer.calls
            ]
        part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
        return [{"type": "message", "id": f"msg_{answer.id}", "role": "assistant", "status": "completed", "content": [part]}]

    def events(self, asked: ChatRequest, answer: ChatAnswer) -> Events:
        """See `Dialect`."""
        whole = self.write(asked, answer)
        found: list[tuple[str, dict[str, Any]]] = [("created", {"response": {**whole, "status": "in_progress", "output": []}})]
        for place, item in enumerate(whole["output"]):
            named = {"output_index": place, "item_id": item["id"]}
            found.append(("output_item.added", {"output_index": place, "item": item}))
            if "content" in item:
                found.append(("output_text.delta", {**named, "content_index": 0, "delta": answer.text, "logprobs": []}))
            else:
                found.append(("function_call_arguments.done", {**named, "arguments": item["arguments"], "name": item["name"]}))
            found.append(("output_item.done", {"output_index": place, "item": item}))
        found.append(("incomplete" if answer.finish == "length" else "completed", {"response": whole}))
        for number, (name, data) in enumerate(found):
            yield f"response.{name}", {"type": f"response.{name}", "sequence_number": number, **data}


def _system(text: Any) -> Message:
    return {"role": "system", "content": text_of(text)}


class Messages(Dialect):
    """`/v1/messages`."""

    def read(self, body: Mapping[str, Any]) -> ChatRequest:
        """See `Dialect`."""
        messages: list[Message] = [] if not body.get("system") else [_system(body["system"])]
        for entry in _list(body.get("messages"), "messages"):
            content = entry.get("content") if isinstance(entry, Mapping) else None
            parts = content if isinstance(content, list) else []
            kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
            used = [part for part, kind in zip(parts, kinds, strict=True) if kind == "tool_use"]
            results = [part for part, kind in zip(parts, kinds, strict=True) if kind == "tool_result"]
            for part in results:
                result = {"role": "tool", "content": text_of(part.get("content")), "tool_call_id": str(part.get("tool_use_id"))}
                messages.append(result)
            texts = [part for part, kind in zip(parts, kinds, strict=True) if kind not in ("tool_use", "tool_result", "thinking")]
            if texts or not results:
                shown = {**entry, "content": texts if parts else content} if isinstance(entry, Mapping) else entry
                calls = [_call({"id": part.get("id"), "function": {**part, "arguments": part.get("input")}}) for part in used]
                messages.append({**plain_message(shown), **({"calls": calls} if calls else {})})
        tools = []
        for entry in _list(body.get("tools") or [], "tools"):
            if not isinstance(entry, Mapping) or "input_schema" not in entry:
                raise RefusedError(f"tools has {shorten(entry, 80)}; only tools with a name and an input_schema can be called")
            tools.append(_tool(entry.get("name"), entry.get("description"), entry["input_schema"]))
        choice = body.get("tool_choice")
        kind = choice.get("type") if isinstance(choice, Mapping) else None
        return ChatRequest(
            messages,
            tools,
            kind != "none",
            _stop(body.get("stop_sequences"), "stop_sequences"),
            _number(body, "max_tokens"),
            body.get("stream") is True,
            False,
            str(body.get("model") or "policy"),
            _ignored(body, kind not in (None, "auto", "none"), False),
        )

    def write(self, asked: ChatRequest, answer: ChatAnswer) -> dict[str, Any]:
        """See `Dialect`."""
        content: list[dict[str, Any]] = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)} for call in answer.calls
        ]
        return {
            **{"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": asked.model},
            "content": content or [{"type": "text", "text": answer.text}],
            "stop_reason": {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}[answer.finish],
            "stop_sequence": None,
            "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.logprobs)},
        }

    def events(self, asked: ChatRequest, answer: ChatAnswer) -> Events:
        """See `Dialect`."""
        whole = self.write(asked, answer)
        yield "message_start", {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}}
        for index, block in enumerate(whole["content"]):
            empty = {**block, **({"text": ""} if "text" in block else {"input": {}})}
            yield "content_block_start", {"type": "content_block_start", "index": index, "content_block": empty}
            written = {"type": "text_delta", "text": block["text"]} if "text" in block else None
            delta = written or {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            yield "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}
            yield "content_block_stop", {"type": "content_block_stop", "index": index}
        ended = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        yield "message_delta", {"type": "message_delta", "delta": ended, "usage": {"output_tokens": len(answer.logprobs)}}
        yield "message_stop", {"type": "message_stop"}

    def error(self, refused: RefusedError) -> dict[str, Any]:
        """See `Dialect`."""
        kind = {401: "authentication_error", 413: "request_too_large"}.get(refused.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": refused.message}}


DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": ChatCompletions(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}

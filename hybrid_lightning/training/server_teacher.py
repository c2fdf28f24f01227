"""`ServerTeacher`: a teacher on a vLLM server, which rates completions as they arrive."""

import os
import threading
import time
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import Distillation
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rollout.future import in_thread
from hybrid_lightning.rollout.vllm.server_checks import check_tokenizer
from hybrid_lightning.rollout.vllm.server_client import Server, ServerError
from hybrid_lightning.shared.reply_cache import ReplyCache
from hybrid_lightning.training.teachers import Interruptible, Teacher
from hybrid_lightning.types import Sequences

_Asked = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a prompt and of a completion
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between attempts, each time twice as long


class ServerTeacher(Teacher):
    """A model with the policy's tokenizer on a server, started by `vllm serve MODEL`.

    A request is sent as soon as a completion has ended, while others are being sampled; for episodes, when all have ended. Failed
    requests are repeated. The API key comes from VLLM_API_KEY.

    Log-probabilities are cached on disk, 6 bytes per token. vLLM's values vary slightly with the server's load; with the cache, a
    run that is resumed in the middle of a rollout gets the same values.

    Args:
        url: Address of the server, such as http://node7:8000.
        timeout_s: Seconds in which a request must succeed, repeated attempts included.
        concurrency: Most requests at the same time.
        cache_dir: Folder of the cached log-probabilities; None for `~/.cache/hybrid_lightning/teacher`.

    Raises:
        ConfigError: If a value is invalid.
    """

    is_remote = True

    def __init__(self, url: str, timeout_s: float = 600.0, concurrency: int = 32, cache_dir: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"ServerTeacher: url={url!r} is not an address; give one such as http://node7:8000")
        self.timeout_s = timeout_s
        self._server = Server(url.rstrip("/"), timeout_s, os.environ.get("VLLM_API_KEY"))
        self._turns, self._lock = threading.Semaphore(concurrency), threading.Lock()
        self._replies, self._model = ReplyCache(cache_dir, "teacher"), ""
        self._asked: dict[_Asked, Future[list[float]]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # as Lightning copies arguments

    def check(self, student: Passes, distillation: Distillation) -> None:
        """See `Teacher`; RolloutError if the server does not answer."""
        if distillation.of_distributions:
            raise ConfigError(
                f"ServerTeacher gives log-probabilities of sampled tokens, but {type(distillation).__name__} compares whole "
                "distributions; set model.distillation=SampledReverseKL, or use ModelTeacher"
            )
        if student.temperature != 1:
            raise ConfigError(
                f"ServerTeacher: vLLM scores prompts at temperature 1, but model.sampler.temperature={student.temperature}; set "
                "it to 1, or use ModelTeacher"
            )
        check_tokenizer(self._server, student.policy.pretrained.tokenizer, "serve a model with the policy's tokenizer")

    def listen(self, prompt_ids: Sequence[Sequence[int]], samples: int) -> Callable[[int, Sequence[int]], object]:
        """See `Teacher`."""
        return lambda row, tokens: self._ask((tuple(prompt_ids[row // samples]), tuple(tokens)))

    def logprobs(self, student: Passes, sequences: Sequences, interruptible: Interruptible = nullcontext) -> Tensor:
        """See `Teacher`; RolloutError if a request fails."""
        columns = (sequences.prompt_ids, sequences.prompt_mask, sequences.completion_ids, sequences.completion_mask)
        rows = [(tuple(a[b].tolist()), tuple(c[d].tolist())) for a, b, c, d in zip(*columns, strict=True)]
        futures = {row: self._ask(rows[row]) for row in range(len(rows)) if rows[row][1]}
        with interruptible():
            while wait(futures.values(), 0.1).not_done:  # looks at signals between
                pass
        used = {prompt for prompt, _ in rows}
        with self._lock:
            self._asked = {asked: future for asked, future in self._asked.items() if asked[0] not in used}
        logprobs = torch.zeros(sequences.completion_ids.shape)
        for row, future in futures.items():
            logprobs[row, : len(rows[row][1])] = torch.tensor(future.result())
        return logprobs.to(sequences.completion_ids.device)

    def _served(self) -> str:
        """Name of the server's model."""
        self._model = self._model or str(self._server.request("GET", "/v1/models")["data"][0]["id"])
        return self._model

    def _ask(self, asked: _Asked) -> "Future[list[float]]":
        with self._lock:
            if asked not in self._asked:
                self._asked[asked] = in_thread(lambda: self._answer(*asked), "teacher")
            return self._asked[asked]

    def _answer(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Log-probabilities of a completion's tokens; ServerError if the server rejects the request or is too late."""
        pause, tokens = _FIRST_PAUSE_S, [*prompt, *completion]
        with self._turns:
            ends = time.monotonic() + self.timeout_s
            while True:
                try:
                    path = self._replies.path(self._server.url, self._served(), prompt, completion)
                    kept = self._replies.known(path)
                    if kept is None:
                        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
                        answer = self._server.request("POST", "/v1/completions", body, limit=self.timeout_s)
                        entries = answer["choices"][0]["prompt_logprobs"]
                        pairs = [*zip(tokens, entries, strict=True)][-len(completion) :]
                        found = array("f", [float(entry[str(token)]["logprob"]) for token, entry in pairs])
                        kept = self._replies.keep(path, b64encode(found).decode())
                    return array("f", b64decode(kept)).tolist()
                except (LookupError, TypeError, ValueError) as error:
                    raise ServerError(self._server.url, f"its log-probabilities cannot be read ({error!r})", 422) from error
                except ServerError as error:
                    if error.is_final or time.monotonic() + pause > ends:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

"""`Server`: one vLLM server: what it has, what is wrong with it, its completions and its weights.

Used of its interface: `/inference/v1/generate`, token ids in and out, which is there with `--enable-scale-out`; and what trains
need (`/weight_info`, `/pause`, `/init_weight_transfer_engine` and so on), which is there with VLLM_SERVER_DEV_MODE=1.
"""

import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.rollout_engine import ServedModel
from hybrid_lightning.rollout.vllm import BACKEND
from hybrid_lightning.rollout.vllm.completing import Answer
from hybrid_lightning.rollout.vllm.installed import check_version
from hybrid_lightning.rollout.vllm.transfer import LACKS, facts_of

BACKENDS = (BACKEND, "nccl")  # ways to send weights
_CONNECT_S = 10.0
_SHORT_S = 30.0  # for questions that a server answers between two steps of its engine
_START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model ... --enable-scale-out --logprobs-mode "
    "processed_logprobs --generation-config vllm --weight-transfer-config '{\"backend\": ...}'"
)
# Texts by which tokenizers are told apart: digits, spaces, several scripts, words that chat templates use.
_PROBES = (
    "0123456789 12*34=408",
    "  two  spaces\n\tand a tab ",
    "na\u00efve \u4f60\u597d \u0437\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \U0001f642",
    "<|im_start|>user<|im_end|><s></s>[INST]<think></think><|eot_id|>",
)


@dataclass(frozen=True)
class ServerFacts:
    """What a server has."""

    model: str
    context: int  # tokens
    sequences: int  # that it completes at once
    dtype: str
    logprobs_mode: str
    backend: str | None  # by which it takes weights
    workers: int
    splits_prompts_on_cpu: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], names: Mapping[str, Any], size: Mapping[str, Any]) -> Self:
        """Read them from a server's answers.

        Args:
            config: Config of vLLM.
            names: The answer to /v1/models.
            size: The answer to /get_world_size.

        Raises:
            KeyError: If something is not there. Other errors are raised if it is of another kind.
        """
        model, scheduler, transfer = config["model_config"], config["scheduler_config"], config.get("weight_transfer_config")
        on_cpu = (config.get("device_config") or {}).get("device_type") == "cpu"
        return cls(
            str(names["data"][0]["id"]),
            int(model["max_model_len"]),
            int(scheduler["max_num_seqs"]),
            str(model["dtype"]).removeprefix("torch."),
            str(model["logprobs_mode"]),
            None if transfer is None else str(transfer["backend"]),
            int(size["world_size"]),
            on_cpu and bool(scheduler.get("enable_chunked_prefill")),
        )


class ServerError(RolloutError):
    """A server does not answer, or refuses.

    Args:
        url: The server's.
        cause: Why, in a line.
        status: Status of its answer; None if it did not answer.
    """

    def __init__(self, url: str, cause: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {cause}")
        self.cause, self.status = cause, status

    @property
    def is_final(self) -> bool:
        """Whether the same request would be refused again."""
        wrong = self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)
        return wrong or self.cause.startswith(("another model", LACKS))


class Server:
    """A vLLM server.

    Args:
        url: Such as http://node7:8000.
        timeout: Longest time for a request in seconds.
        key: Its API key, if it asks for one.
    """

    def __init__(self, url: str, timeout: float, key: str | None) -> None:
        self.url, self.timeout = url, timeout
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._facts: ServerFacts | None = None
        self._client: httpx.Client | None = None

    # ---- checks

    @property
    def facts(self) -> ServerFacts:
        """What it has; asked once."""
        if self._facts is None:
            self._facts = self._ask_facts()
        return self._facts

    def _ask_facts(self) -> ServerFacts:
        # The first time it looks at its whole environment, which takes seconds.
        info = self._ask("GET", "/server_info", params={"config_format": "json"}, limit=2 * _SHORT_S)
        names, size = self._ask("GET", "/v1/models"), self._ask("GET", "/get_world_size")
        try:
            return ServerFacts.of(info["vllm_config"], names, size)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            cause = f"its answer to /server_info lacks {error}: another version of vLLM than those that are supported"
            raise ServerError(self.url, cause) from error

    @property
    def is_known(self) -> bool:
        """Whether `facts` have been asked."""
        return self._facts is not None

    def forget(self) -> None:
        """Ask `facts` again when they are needed: it may have been started again."""
        self._facts = None

    def check(self, model: ServedModel, max_new_tokens: int) -> None:
        """Make sure that it can complete for a policy.

        Raises:
            ConfigError: If it cannot; the message says how to start it.
            ServerError: If it does not answer.
        """
        self._check_interface()
        facts = self.facts
        if facts.logprobs_mode != "processed_logprobs":
            raise ConfigError(
                f"{self.url} gives {facts.logprobs_mode}, which are not those of what it samples from; start it with "
                "--logprobs-mode processed_logprobs"
            )
        if facts.splits_prompts_on_cpu:
            raise ConfigError(
                f"{self.url} takes long prompts in pieces, by which vLLM 0.32 ends on a CPU where requests have seeds; start it "
                "with --no-enable-chunked-prefill"
            )
        if facts.backend not in BACKENDS:
            raise ConfigError(
                f"{self.url} cannot be sent weights ({facts.backend or 'no'} weight transfer); start it with "
                f'--weight-transfer-config \'{{"backend": "nccl"}}\' on GPUs, or with "{BACKEND}" on CPUs and wherever NCCL '
                "cannot be had, which needs hybrid_lightning in its environment"
            )
        if facts.backend == "nccl" and model.device.type != "cuda":
            raise ConfigError(
                f"{self.url} takes weights by NCCL, which a policy on {model.device.type} cannot send by; start it with "
                f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\''
            )
        if facts.context <= max_new_tokens:
            raise ConfigError(
                f"{self.url} has a context of {facts.context} tokens, which leaves no room for a prompt beside sampler."
                f"max_new_tokens={max_new_tokens}; start it with a longer --max-model-len, or lower sampler.max_new_tokens"
            )
        self._check_tokenizer(model.tokenizer)
        self._check_config(model)
        wanted = str(model.dtype).removeprefix("torch.")
        if facts.dtype != wanted:
            rank_zero_warn(
                f"{self.url} computes in {facts.dtype} and the policy in {wanted}, so that their probabilities differ more than "
                f"they need to; start it with --dtype {wanted}"
            )

    def _check_interface(self) -> None:
        version = self._ask_if_there("/version")
        if not version:
            raise ConfigError(f"{self.url} is no vLLM server (it has no /version); start one there: {_START}")
        check_version(str(version["version"]), self.url)
        if not self._ask_if_there("/weight_info"):
            raise ConfigError(
                f"{self.url} has no interface for weights; start it with VLLM_SERVER_DEV_MODE=1 in its environment: {_START}"
            )
        if self._ask_if_there("/inference/v1/generate") is None:
            raise ConfigError(f"{self.url} does not take token ids; start it with --enable-scale-out: {_START}")

    def _ask_if_there(self, path: str) -> Any:
        """The answer to a GET request; None if there is no such path. Where only POST is allowed the answer is empty."""
        try:
            return self._ask("GET", path)
        except ServerError as error:
            if error.status not in (404, 405):
                raise
            return None if error.status == 404 else {}

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        size = len(tokenizer)
        words = tokenizer.decode([number * size // 32 for number in range(32)])
        for text in (*_PROBES, str(words), " ".join(tokenizer.all_special_tokens)):
            try:
                wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            except Exception:  # of a tokenizer without an unknown token, whose class the library keeps to itself
                continue
            try:
                found: Any = self._ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            except ServerError as error:
                if error.status in (404, 405, 501):
                    return  # started without a tokenizer
                if error.status is None:
                    raise
                found = f"nothing ({error.cause})"
            if found != wanted:
                raise ConfigError(
                    f"{self.url} ({self.facts.model}) has another tokenizer than the policy: it splits {text!r} into "
                    f"{str(found)[:60]} and the policy into {str(wanted)[:60]}; start it with the policy's model"
                )

    def _check_config(self, model: ServedModel) -> None:
        if self.facts.backend != BACKEND:
            return  # vLLM's own transfers compare nothing
        try:
            facts = facts_of(model.config)
            self.init_weight_transfer_engine({"host": "", "port": 0, "ranks": 0, "timeout_s": 1, "config": facts})
        except ServerError as error:
            if not error.is_final:
                raise
            name = getattr(model.config, "_name_or_path", "") or "the policy's model"
            raise ConfigError(
                f"{self.url} has {self.facts.model}, not {name}: {error.cause}; start it with the policy's"
            ) from error

    # ---- weights

    def label(self, limit: float = _SHORT_S) -> str:
        """Which weights it has, as it was told."""
        return str(self._ask("GET", "/weight_info", limit=limit)["weight_version"])

    def set_label(self, label: str) -> None:
        """Tell it which weights it has."""
        self._ask("POST", "/update_weight_version", {"new_version": label})

    def pause(self) -> None:
        """End all requests, and begin no others."""
        self._ask("POST", "/pause", params={"mode": "abort"}, limit=self.timeout)

    def resume(self) -> None:
        """Begin requests again."""
        self._ask("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Forget what other weights have computed."""
        self._ask("POST", "/reset_prefix_cache")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let its workers connect to the sender."""
        body = {"init_info": init_info}
        self._after_a_stop(lambda: self._ask("POST", "/init_weight_transfer_engine", body, limit=self.timeout))

    def shutdown_weight_transfer_engine(self, limit: float = _SHORT_S) -> None:
        """Let its workers close their connection."""
        self._after_a_stop(lambda: self._ask("POST", "/shutdown_weight_transfer_engine", limit=limit))

    def start_weight_update(self) -> None:
        """Let it expect weights."""
        self._after_a_stop(lambda: self._ask("POST", "/start_weight_update", limit=self.timeout))

    def update_weights(self, update_info: Any, limit: float | None = None) -> None:
        """Let it receive weights."""
        self._ask("POST", "/update_weights", {"update_info": update_info}, limit=limit or self.timeout)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let it use the weights that came."""
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._ask("POST", "/finish_weight_update", body, limit=self.timeout)

    def _after_a_stop(self, request: Callable[[], Any]) -> None:
        """Make a request, again if an update is open that a sender began and, since it was stopped, did not end."""
        try:
            request()
        except ServerError as error:
            if "already active" not in error.cause and "during a weight update" not in error.cause:
                raise
            self.finish_weight_update()
            request()

    # ---- completions

    async def complete(
        self, client: httpx.AsyncClient, name: str, ids: Sequence[int], parameters: dict[str, Any]
    ) -> list[Answer]:
        """Complete a prompt.

        Args:
            client: From `connections`.
            name: By which the request can be ended.
            ids: Token ids of the prompt.
            parameters: Of vLLM's `SamplingParams`.

        Raises:
            ServerError: If it does not, or has been told to end the request.
        """
        body = {"request_id": name, "token_ids": list(ids), "sampling_params": parameters}
        try:
            response = await client.post(f"{self.url}/inference/v1/generate", json=body, headers=self._headers)
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        choices = sorted(self._content(response)["choices"], key=lambda choice: int(choice["index"]))
        reasons = {choice["finish_reason"] for choice in choices}
        if not reasons <= {"stop", "length"} or len(choices) != parameters["n"]:
            raise ServerError(self.url, f"it ended completions by {sorted(map(str, reasons))}: it has been told to pause")
        return [_answer(choice) for choice in choices]

    async def end(self, client: httpx.AsyncClient, names: Sequence[str]) -> None:
        """End requests, if it still answers."""
        try:
            ids = [f"generate-tokens-{name}" for name in names]  # as vLLM calls them
            await client.post(f"{self.url}/inference/v1/abort_requests", json={"request_ids": ids}, headers=self._headers)
        except httpx.HTTPError:
            pass  # it ends them by itself when their connections are closed

    async def label_now(self, client: httpx.AsyncClient) -> str:
        """See `label`."""
        try:
            return str(self._content(await client.get(f"{self.url}/weight_info", headers=self._headers))["weight_version"])
        except httpx.HTTPError as error:
            raise self._failure(error) from error

    def connections(self) -> httpx.AsyncClient:
        """Connections for completions, of this server and others like it."""
        return httpx.AsyncClient(timeout=httpx.Timeout(self.timeout, connect=_CONNECT_S), **self._options)

    # ---- requests

    def close(self) -> None:
        """Close what requests are made by."""
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "trust_env": False,  # no proxy of the environment: weights go to a server directly, too
            "verify": ssl.create_default_context() if self.url.startswith("https") else False,
            # None is used twice: a server may have closed it meanwhile, as vLLM's does after an error.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
        }

    def _ask(
        self, method: str, path: str, body: Any = None, *, params: dict[str, str] | None = None, limit: float = _SHORT_S
    ) -> Any:
        """Make a request, and return the JSON of its answer."""
        timeout = httpx.Timeout(min(limit, self.timeout) if limit <= _SHORT_S else limit, connect=_CONNECT_S)
        try:
            if self._client is None:
                self._client = httpx.Client(**self._options)
            response = self._client.request(
                method, f"{self.url}{path}", json=body, params=params, headers=self._headers, timeout=timeout
            )
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        return self._content(response)

    def _content(self, response: httpx.Response) -> Any:
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError as error:
                raise ServerError(self.url, f"{response.request.url.path}: no JSON, so no vLLM answers there", 404) from error
        cause = _cause(response)
        if response.status_code in (401, 403):
            cause = f"it asks for an API key ({cause}); set VLLM_API_KEY to it, here as there"
        elif response.status_code == 404 or not cause:
            cause = f"{response.request.url.path}: {response.status_code} {cause}".rstrip()
        raise ServerError(self.url, cause, response.status_code)

    def _failure(self, error: httpx.HTTPError) -> ServerError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerError(self.url, f"nothing answers there ({str(error) or 'no connection'})")
        if isinstance(error, httpx.TimeoutException):
            return ServerError(self.url, "no answer in time; it hangs, or has too much to do")
        return ServerError(self.url, f"the connection broke ({str(error) or type(error).__name__})")


def _answer(choice: dict[str, Any]) -> Answer:
    tokens = choice["token_ids"]
    logprobs = [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ()]
    spans = choice.get("weight_versions") or ([{"version": "unknown"}] if tokens else [])
    return Answer(tokens, logprobs, choice["finish_reason"] == "stop", [str(span["version"]) for span in spans])


def _cause(response: httpx.Response) -> str:
    """What a server says is wrong, in a line."""
    try:
        content = response.json()
        error = content.get("error", content.get("detail", content))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    worker = re.search(r"Worker failed with error ['\"](.*)['\"], please check", text, re.DOTALL)
    return " ".join((worker[1] if worker else text).split())[:400]

"""`VLLMSampler`: completions by a vLLM engine in the training process, one for each device."""

import atexit
import gc
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, RolloutError, one_line
from hybrid_lightning.rollout.batching import pad_right, pad_token
from hybrid_lightning.rollout.interface import PolicyWeight, PolicyWeights, PromptLogprobs, SamplingRequest, ServedModel
from hybrid_lightning.rollout.rollout_engine import BatchEngine
from hybrid_lightning.rollout.vllm import completing
from hybrid_lightning.rollout.vllm.adapter import check_applied, least_max_rank, split, write_folder
from hybrid_lightning.rollout.vllm.completing import (
    Answer,
    VLLMEngine,
    check_answer,
    prompt_draws,
    states_of,
    steps_of,
    vocabulary_of,
)
from hybrid_lightning.rollout.vllm.deferred import Deferred, load
from hybrid_lightning.rollout.vllm.isolated_process import IsolatedProcess
from hybrid_lightning.rollout.vllm.names import IN_PROCESS, check_names, installed_version
from hybrid_lightning.runner import TokenSizes
from hybrid_lightning.types import Rollout

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner

_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights do not have to leave it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default would also bind training's threads to cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": None,  # it would override the planned size
}
# Arguments of vLLM that are set elsewhere -> where.
_NOT_FURTHER = {
    **dict.fromkeys(("model", "dtype", "load_format", "logprobs_mode"), "it follows from the policy"),
    **{name: f"give it as sampler.{name}" for name in ("gpu_memory_utilization", "max_model_len")},
    "enable_sleep_mode": "give sampler.sleep",
}
_ROUNDS = frozenset(("quantization", "kv_cache_dtype"))  # arguments with which an engine in float32 rounds more than that
_CPU_CACHE = 2**30  # most bytes of the KV cache on a CPU, where vLLM's default is a share of the whole memory
_CPU_SEQUENCES = 128  # sequences completed together there
_CPU_TOKENS = 2**13  # tokens of prompts processed together there, at least


class VLLMSampler(VLLMEngine, BatchEngine):
    """Samples with a vLLM engine in the training process, on the device that trains.

    The engine has its own weights. Before each rollout the weights that training has changed are copied to it, with LoRA merged
    and without a file in between. Needs the extra `vllm`.

    Args:
        gpu_memory_utilization: Share of the device's memory that the engine may take, for its weights and its KV cache. Not used
            on a CPU: there the cache has room for 128 sequences of `max_model_len` tokens, 1 GiB at most.
        max_model_len: Longest prompt with completion, in tokens; None takes the model's positions, or the length that fits into
            memory.
        sleep: Memory that the engine frees while the policy is updated: `kv_cache`; `weights` also moves its weights to the host;
            `nothing` frees nothing. On a CPU nothing is freed.
        engine_args: Further arguments of `vllm.LLM`, such as `{max_num_seqs: 512, enforce_eager: true}`.
        options: Arguments of `RolloutEngine`.

    Raises:
        ConfigError: If a value is impossible.
    """

    shares_device = True

    def __init__(
        self,
        *,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        sleep: Literal["nothing", "kv_cache", "weights"] = "kv_cache",
        engine_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < gpu_memory_utilization < 1:
            raise ConfigError(f"sampler.gpu_memory_utilization must be between 0 and 1, got {gpu_memory_utilization}")
        if max_model_len is not None and max_model_len <= self.max_new_tokens:
            raise ConfigError(
                f"sampler.max_model_len={max_model_len} leaves no room for a prompt with "
                f"sampler.max_new_tokens={self.max_new_tokens}; raise it, or leave it out"
            )
        if sleep not in ("nothing", "kv_cache", "weights"):
            raise ConfigError(f"sampler.sleep must be nothing, kv_cache or weights, got {sleep!r}")
        for name in _NOT_FURTHER.keys() & (engine_args or {}).keys():
            raise ConfigError(f"sampler.engine_args must not have {name!r}; {_NOT_FURTHER[name]}")
        self.gpu_memory_utilization, self.max_model_len, self.sleep = gpu_memory_utilization, max_model_len, sleep
        self.engine_args = dict(engine_args or {})
        self._process = IsolatedProcess(_ENVIRONMENT)
        self._llm: Any = None
        self._base = ""  # `PolicyWeights.base` when the engine received all weights
        self._asleep = False
        self._adapter: tempfile.TemporaryDirectory[str] | None = None  # folder of separately sent LoRA
        self._adapter_is_on = False  # whether the current policy has it
        self._room = 0  # largest rank that the engine was started for
        self._requests = itertools.count()

    def check_model(self, model: ServedModel) -> None:
        """Raise ConfigError unless vLLM is installed, and its engine is available for the device that trains."""
        completing.check_installed(model.device.type)
        if torch.cuda.is_available() and model.device.type == "cpu":
            raise ConfigError(
                "model.sampler=VLLMSampler samples on this machine's GPU, but training is set to the CPU; set "
                "trainer.accelerator=gpu, or leave model.sampler out"
            )
        if model.device.type == "cpu":
            completing.check_on_cpu(model.config, model.dtype, "model.sampler=VLLMSampler samples", self.sends_adapter)

    def context(self, config: Any) -> tuple[float, str]:
        """The model's limit, or `max_model_len`."""
        given = math.inf if self.max_model_len is None else self.max_model_len
        return min(super().context(config), (given, f"sampler.max_model_len={given}"))

    # ---- weights

    def needs_everything(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """True at the start, unless the engine reads the weights from a folder, and when the base has been quantized."""
        return model.folder is None if self._llm is None or self._has_no_room(model) else self._base != weights.base

    def _has_no_room(self, model: ServedModel) -> bool:
        """Whether the engine was started for less LoRA than the policy now has, for example before it was adapted."""
        return self.sends_adapter and self._room < model.lora_rank

    def update(
        self, weights: PolicyWeights, model: ServedModel, everything: bool | None = None, keeps_requests: bool = False
    ) -> None:
        """Give the engine the policy's weights, unless it has them already; the first call starts it."""
        everything = self.needs_everything(weights, model) if everything is None else everything
        if self._has_no_room(model):
            self.shut_down()
        with self._process.entered():
            if self._llm is None:
                self._start(model)
                self._room = model.lora_rank
            elif self.version == weights.version:
                return
            self._wake("weights")
        self.version, self._base = None, ""  # until everything has succeeded
        with self._process.entered():
            stream, factors = self._gathered(weights.stream(everything)), dict[str, Tensor]()
            if everything or not self.sends_adapter:
                self._llm.collective_rpc(load, args=(split(stream, factors), everything))
            else:
                factors = dict(stream)
            self._adapter_is_on = weights.adapter is not None
            if weights.adapter is not None:
                self._load_adapter(weights.adapter, factors, model.dtype)
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.set_weight_version(str(weights.version))
        self._base, self.version = weights.base, weights.version

    def _gathered(self, weights: Iterator[PolicyWeight]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each weight; ranks may have to gather it, through their own process groups."""
        while True:
            with self._process.with_own_groups():
                weight = next(weights, None)
            if weight is None:
                return
            yield weight.name, Deferred.of(weight)

    def _load_adapter(self, config: Mapping[str, Any], factors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Make the engine replace its current LoRA with LoRA from a folder."""
        self._llm.collective_rpc(lambda worker: check_applied(worker.model_runner.model, factors))
        self._adapter = self._adapter or tempfile.TemporaryDirectory(prefix="hybrid_lightning_")
        values = {name: value.computed().to(dtype) for name, value in factors.items() if isinstance(value, Deferred)}
        write_folder(Path(self._adapter.name), config, values)
        self._llm.llm_engine.add_lora(self._lora_request(load_inplace=True))

    def _lora_request(self, load_inplace: bool = False) -> Any:
        """The adapter by vLLM's name; with `load_inplace` in a completion request, vLLM would load it for each token."""
        from vllm.lora.request import LoRARequest

        assert self._adapter is not None
        return LoRARequest("policy", 1, self._adapter.name, load_inplace=load_inplace)

    # ---- the engine

    def _start(self, model: ServedModel) -> None:
        self.check_model(model)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # for all of vLLM's processes; a user's own setting stays
        rank_zero_info("vLLM: starting an engine in this process, which takes from seconds to a minute")
        with tempfile.TemporaryDirectory(prefix="hybrid_lightning_") as written:
            options = self._options(model, written)
            try:
                from vllm import LLM

                check_names(IN_PROCESS, installed_version(), "this environment")
                self._llm = LLM(**options)
            except ConfigError:
                raise
            except Exception as error:  # vLLM and CUDA have no classes for it
                text, remedy = one_line(error), "see docs/how-to/vllm.md, or leave model.sampler out to sample without vLLM"
                if "memory" in text.lower() or "KV cache" in text:
                    remedy = (
                        f"change sampler.gpu_memory_utilization={self.gpu_memory_utilization}, lower sampler.max_model_len, or "
                        "give servers on other devices (VLLMServerSampler)"
                    )
                raise RolloutError(f"vLLM did not start: {text}; {remedy}") from error
        # A run stopped by a signal has no teardown. vLLM's own exit handler runs later, and would not find its groups.
        atexit.register(self.shut_down)
        context = self._llm.llm_engine.model_config.max_model_len
        if context <= self.max_new_tokens:
            raise ConfigError(
                f"vLLM's context of {context} tokens leaves no room for a prompt with sampler.max_new_tokens="
                f"{self.max_new_tokens}; raise sampler.gpu_memory_utilization or lower sampler.max_new_tokens"
            )
        self.max_model_len = context

    def _options(self, model: ServedModel, folder: str) -> dict[str, Any]:
        """Arguments of `vllm.LLM`; if weights are sent, a folder without weights describes the model."""
        options: dict[str, Any] = {
            "model": model.folder or folder,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",  # of softmax(logits / temperature)
            "generation_config": "vllm",  # no sampling parameters from the model's files
            "max_model_len": self.max_model_len or -1,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if model.folder is None:
            model.config.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            options["load_format"] = "dummy"
        if self.sends_adapter and model.lora_rank:
            # Without the list vLLM reserves room at the output layer as well, and fails on a CPU at log-probabilities of prompts.
            options |= {"enable_lora": True, "lora_target_modules": list(model.lora_modules)}
            options["max_lora_rank"] = least_max_rank(model.lora_rank)
        if model.device.type == "cpu":
            options |= {"enforce_eager": True, "max_num_seqs": _CPU_SEQUENCES}
            context = options["max_model_len"] = self._context_on_cpu(model.config)
            # vLLM 0.32 crashes on a CPU if it splits a prompt with a seed into chunks ("CPU Generator does not use offset").
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, _CPU_TOKENS)}
            if states_of(model.config):  # vLLM keeps states for prefixes only with chunked prefill
                options["enable_prefix_caching"] = False
            options["kv_cache_memory_bytes"] = self.cache_bytes_on_cpu(model.config, model.dtype)
            del options["gpu_memory_utilization"]
        else:
            options["enable_sleep_mode"] = self.sleep != "nothing"
            options["distributed_executor_backend"] = "external_launcher"  # it takes the device from the variables below
            self._process.set(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(model.device.index or 0))
            self._process.set(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(find_free_network_port()))
        return options | self.engine_args

    def cache_bytes_on_cpu(self, config: Any, dtype: torch.dtype) -> int:
        """Bytes of the KV cache on a CPU: for 128 of the longest sequences, within bounds, and for one in any case."""
        one = self._context_on_cpu(config) * cache_bytes_of_token(config, dtype)
        chosen = max(2**26, one, min(_CPU_CACHE, _CPU_SEQUENCES * one))
        return int(self.engine_args.get("kv_cache_memory_bytes") or chosen)

    def _context_on_cpu(self, config: Any) -> int:
        return self.max_model_len or getattr(config.get_text_config(), "max_position_embeddings", None) or 4096

    @torch.no_grad()
    def sample(self, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> Rollout:
        """Complete every prompt of a request. `on_token` is called from time to time, not after every token."""
        assert self.version is not None, "the engine has to receive weights first"
        limits, samples, draws = self.checked_limits(runner, request), request.samples_per_prompt, prompt_draws(request)
        stop_ids, vocabulary = (request.stops or self.stops(tokenizer)).ids, vocabulary_of(runner)
        listener = self.listener(tokenizer, request)
        arguments = [
            self.parameters(
                stop_ids, samples, draws.seed_of(row, 0), request.greedy, max(limits[row : row + samples]), request.stop
            )
            for row in range(0, len(limits), samples)
        ]

        def answered(number: int, answers: Sequence[Answer]) -> None:
            for sample, answer in enumerate(answers):
                check_answer(answer, vocabulary)
                if listener is not None:
                    listener(number * samples + sample, answer.tokens, answer.finished)

        answers = self._completed(request, arguments, answered)
        device = next(runner.model.parameters()).device
        tokens, mask = pad_right([answer.tokens for answer in answers], pad_token(tokenizer), device)
        logprobs, steps = torch.zeros(tokens.shape, dtype=torch.float32), torch.zeros_like(tokens)
        for row, answer in enumerate(answers):
            logprobs[row, : len(answer.logprobs)] = torch.tensor(answer.logprobs)
            steps[row, : len(answer.tokens)] = torch.tensor(steps_of(answer), device=device)
        finished = torch.tensor([answer.finished for answer in answers], device=device)
        return self.rollout(tokenizer, request, tokens, mask, logprobs.to(device), finished, steps)

    def _completed(
        self,
        request: SamplingRequest,
        arguments: Sequence[dict[str, Any]],
        on_answers: Callable[[int, Sequence[Answer]], None],
    ) -> list[Answer]:
        """The G answers to each of P prompts, given the arguments of vLLM's `SamplingParams` for each."""
        answers: dict[str, list[Answer]] = {}
        with self._process.entered():
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind

            self._wake("kv_cache")
            engine, adapter = self._llm.llm_engine, self._lora_request() if self._adapter_is_on else None
            # Names of requests -> number of the prompt.
            names = {f"completion-{next(self._requests)}": number for number in range(len(request.prompt_ids))}
            try:
                for name, ids, given in zip(names, request.prompt_ids, arguments, strict=True):
                    wanted = SamplingParams(**given, output_kind=RequestOutputKind.FINAL_ONLY)
                    engine.add_request(name, {"prompt_token_ids": list(ids)}, wanted, lora_request=adapter)
                steps = 0
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            answers[output.request_id] = found = [_answer(one) for one in output.outputs]
                            on_answers(names[output.request_id], found)
                    steps += 1
                    if request.on_token is not None:
                        request.on_token(engine.get_num_unfinished_requests(), min(steps, self.max_new_tokens))
            except BaseException:  # a signal, too
                engine.abort_request([name for name in names if name not in answers])
                raise
        in_order = [answer for name in names for answer in answers[name]]
        others = {label for answer in in_order for label, _ in answer.versions} - {str(self.version)}
        if others:
            raise RolloutError(
                f"vLLM completed with weights of version {min(others)}, and the policy has {self.version}; nothing else may set "
                "the weights of this engine"
            )
        return in_order

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> "Future[list[PromptLogprobs]]":
        """Log-probabilities of sequences, ready when this returns."""
        with self._process.entered():
            from vllm import SamplingParams

            self._wake("kv_cache")
            prompts = [{"prompt_token_ids": ids} for ids in token_ids]
            arguments = SamplingParams(**completing.PROMPT_LOGPROBS)
            adapter = self._lora_request() if self._adapter_is_on else None
            outputs = self._llm.generate(prompts, arguments, use_tqdm=False, lora_request=adapter)
        labels = {span.version for output in outputs for span in output.outputs[0].weight_versions or ()}
        rows = [zip(ids, output.prompt_logprobs, strict=True) for ids, output in zip(token_ids, outputs, strict=True)]
        logprobs = [[entry[token].logprob for token, entry in [*row][1:]] for row in rows]
        answer: Future[list[PromptLogprobs]] = Future()
        in_float32 = self._llm.llm_engine.model_config.dtype == torch.float32 and _ROUNDS.isdisjoint(self.engine_args)
        answer.set_result([PromptLogprobs("vLLM", completing.one_version(labels), logprobs, in_float32)])
        return answer

    def release_memory(self) -> None:
        """Free the memory that `sleep` names, with vLLM's sleep mode, on GPUs."""
        if self._llm is None or self._asleep or self.sleep == "nothing" or not torch.cuda.is_available():
            return
        with self._process.entered():
            if self.sleep == "weights":
                self._llm.sleep(level=1)
            else:
                self._llm.sleep(level=0)
                self._llm.release_kv_cache_memory()
        self._asleep = True

    def _wake(self, tag: str) -> None:
        """Take back the memory of weights or KV cache; the cache's memory only after the weights have been updated."""
        if not self._asleep or (tag == "weights" and self.sleep == "kv_cache"):
            return
        self._llm.wake_up(tags=[tag])
        self._asleep = tag != "kv_cache"

    def shut_down(self) -> None:
        """End the engine."""
        atexit.unregister(self.shut_down)
        if self._llm is None:
            return
        with self._process.entered():
            from vllm.distributed import parallel_state

            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD = None
            self._process.end_groups()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.version, self._base, self._asleep = None, "", False


def _answer(output: Any) -> Answer:
    if output.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended a completion with {output.finish_reason!r}: {output.stop_reason}")
    logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    versions = [(span.version, span.start) for span in output.weight_versions or ()]
    return Answer(list(output.token_ids), logprobs, output.finish_reason == "stop", versions)


def cache_bytes_of_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the KV cache for one token, in the dtype of the engine's weights."""
    return TokenSizes(config).cached * dtype.itemsize

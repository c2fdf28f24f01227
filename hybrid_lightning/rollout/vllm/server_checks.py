"""Whether a vLLM server can complete for a policy, and if not, how to start it."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.interface import ServedModel
from hybrid_lightning.rollout.vllm import BACKEND
from hybrid_lightning.rollout.vllm.adapter import least_max_rank
from hybrid_lightning.rollout.vllm.completing import check_on_cpu
from hybrid_lightning.rollout.vllm.names import check_paths, warn_unless_run
from hybrid_lightning.rollout.vllm.server_client import Server, ServerError
from hybrid_lightning.rollout.vllm.transfer import facts_of

_START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model ... --enable-scale-out --logprobs-mode "
    "processed_logprobs --generation-config vllm --weight-transfer-config '{\"backend\": ...}'"
)
# Texts that distinguish tokenizers: digits, spaces, several scripts, words that chat templates use.
_PROBES = (
    "0123456789 12*34=408",
    "  two  spaces\n\tand a tab ",
    "na\u00efve \u4f60\u597d \u0437\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \U0001f642",
    "<|im_start|>user<|im_end|><s></s>[INST]<think></think><|eot_id|>",
)


def check_server(server: Server, model: ServedModel, max_new_tokens: int, takes_adapter: bool = False) -> None:
    """Make sure that a server can complete for a policy; `takes_adapter` if it may receive LoRA separately from the base.

    Raises:
        ConfigError: If it cannot; the message explains how to start it.
        ServerError: If it does not answer.
    """
    _check_interface(server)
    facts, ours = server.facts, f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\''
    if facts.logprobs_mode != "processed_logprobs":
        fault = f"returns {facts.logprobs_mode}, not the log-probabilities of the distribution that it samples from"
        raise _fault(server, fault, "--logprobs-mode processed_logprobs")
    if facts.splits_prompts_on_cpu:
        fault = "splits long prompts into chunks, which crashes vLLM 0.32 on a CPU if requests have seeds"
        raise _fault(server, fault, "--no-enable-chunked-prefill")
    if facts.on_cpu:
        check_on_cpu(model.config, getattr(torch, facts.dtype), f"{server.url} runs", takes_adapter)
    if facts.backend not in (BACKEND, "nccl"):
        remedy = f'{ours.replace(BACKEND, "nccl")} on GPUs, or with "{BACKEND}" on CPUs and without NCCL, which needs '
        fault = f"cannot receive weights ({facts.backend or 'no'} weight transfer)"
        raise _fault(server, fault, f"{remedy}hybrid_lightning in its environment")
    if facts.backend == "nccl" and model.device.type != "cuda":
        raise _fault(server, f"takes weights over NCCL, which a policy on {model.device.type} cannot use", ours)
    if takes_adapter:
        _check_adapter(server, model, ours)
    if facts.context <= max_new_tokens:
        fault = f"has a context of {facts.context} tokens: no room for a prompt with sampler.max_new_tokens={max_new_tokens}"
        raise _fault(server, fault, "a longer --max-model-len, or lower sampler.max_new_tokens")
    check_tokenizer(server, model.tokenizer, "start it with the policy's model")
    _check_config(server, model)
    wanted = str(model.dtype).removeprefix("torch.")
    if facts.dtype != wanted:
        rank_zero_warn(
            f"{server.url} computes in {facts.dtype} and the policy in {wanted}, so their probabilities differ more than "
            f"necessary; start it with --dtype {wanted}"
        )


def _check_adapter(server: Server, model: ServedModel, ours: str) -> None:
    rank, facts = least_max_rank(model.lora_rank), server.facts
    if facts.max_lora_rank < model.lora_rank or not facts.max_lora_rank:
        fault = f"takes LoRA up to rank {facts.max_lora_rank}, and the policy has rank {model.lora_rank}"
        raise _fault(server, fault if facts.max_lora_rank else "takes no LoRA", f"--enable-lora --max-lora-rank {rank}")
    if facts.on_cpu and facts.lora_anywhere:
        fault = "has LoRA at its output layer, which crashes vLLM on a CPU at log-probabilities of prompts"
        raise _fault(server, fault, f"--lora-target-modules {' '.join(model.lora_modules)}")
    if _get_if_available(server, "/v1/load_lora_adapter") is None:
        raise _fault(server, "cannot load an adapter at run time", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")
    if facts.backend != BACKEND:
        raise _fault(server, f"takes weights over {facts.backend}, which cannot carry an adapter", ours)


def _fault(server: Server, fault: str, start: str) -> ConfigError:
    return ConfigError(f"{server.url} {fault}; start it with {start}")


def _check_interface(server: Server) -> None:
    version = _get_if_available(server, "/version")
    if not version:
        raise ConfigError(f"{server.url} is not a vLLM server (it has no /version); start one there: {_START}")
    found = str(version["version"])
    warn_unless_run(found, server.url)
    if not _get_if_available(server, "/weight_info"):
        raise _fault(server, "has no interface for weights", f"VLLM_SERVER_DEV_MODE=1 in its environment: {_START}")
    if _get_if_available(server, "/inference/v1/generate") is None:
        raise _fault(server, "does not take token ids", f"--enable-scale-out: {_START}")
    if description := _get_if_available(server, "/openapi.json"):  # unless it was started with --disable-fastapi-docs
        check_paths(description, found, server.url)


def _get_if_available(server: Server, path: str) -> Any:
    """The answer to a GET request; None if there is no such path, and empty if only POST is allowed."""
    try:
        return server.request("GET", path)
    except ServerError as error:
        if error.status not in (404, 405):
            raise
        return None if error.status == 404 else {}


def check_tokenizer(server: Server, tokenizer: PreTrainedTokenizerBase, remedy: str) -> None:
    """Raise ConfigError with a remedy unless the server splits some texts into the same tokens."""
    size = len(tokenizer)
    words = tokenizer.decode([number * size // 32 for number in range(32)])
    for text in (*_PROBES, str(words), " ".join(tokenizer.all_special_tokens)):
        try:
            wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # of a tokenizer without an unknown token; the library hides its class
            continue
        try:
            found: Any = server.request("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        except ServerError as error:
            if error.status in (404, 405, 501):
                return  # started without a tokenizer
            if error.status is None:
                raise
            found = f"nothing ({error.cause})"
        if found != wanted:
            raise ConfigError(
                f"{server.url} has another tokenizer than the policy: it splits {text!r} into {str(found)[:60]}, the policy "
                f"into {str(wanted)[:60]}; {remedy}"
            )


def _check_config(server: Server, model: ServedModel) -> None:
    if server.facts.backend != BACKEND:
        return  # vLLM's own transfers compare nothing
    try:
        facts = facts_of(model.config)
        server.init_weight_transfer_engine({"host": "", "port": 0, "ranks": 0, "timeout_s": 1, "config": facts})
    except ServerError as error:
        if not error.is_final:
            raise
        name = getattr(model.config, "_name_or_path", "") or "the policy's model"
        raise ConfigError(
            f"{server.url} has {server.facts.model}, not {name}: {error.cause}; start it with the policy's model"
        ) from error

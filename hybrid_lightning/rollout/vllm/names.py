"""What this package uses of vLLM, and which version has it: any version that has the names can be used.

The names are checked when an engine starts in this process, and the paths of a server before it is used. A version with which the
tests were not run gets a warning, and is refused only where a name is missing. docs/how-to/vllm.md says what was run.
"""

import importlib
import re
from collections.abc import Iterable
from functools import reduce
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from hybrid_lightning.errors import ConfigError

RUN = ("0.32",)  # with which tests/with_vllm passes

# Each entry is the first version that has the names, of those that were looked at (0.31 to 0.33), the module, and the names.
Entry = tuple[str, str, str]
# Loads weights: by an engine in this process, and by `receiver.py` in a server.
LOADING: tuple[Entry, ...] = (
    ("0.31", "vllm.config", "set_current_vllm_config"),
    ("0.31", "vllm.model_executor.model_loader.reload", "initialize_layerwise_reload finalize_layerwise_reload"),
    ("0.31", "vllm.model_executor.model_loader.reload.layerwise", "get_layerwise_info"),
)
IN_PROCESS: tuple[Entry, ...] = (
    *LOADING,
    ("0.31", "vllm", "LLM.collective_rpc LLM.generate LLM.reset_prefix_cache LLM.sleep LLM.wake_up SamplingParams"),
    ("0.31", "vllm", "LLM.release_kv_cache_memory"),
    ("0.31", "vllm.sampling_params", "RequestOutputKind.FINAL_ONLY"),
    ("0.32", "vllm.outputs", "CompletionOutput.weight_versions"),
    ("0.31", "vllm.v1.engine.llm_engine", "LLMEngine.add_request LLMEngine.abort_request LLMEngine.step LLMEngine.add_lora"),
    ("0.31", "vllm.v1.engine.llm_engine", "LLMEngine.has_unfinished_requests LLMEngine.get_num_unfinished_requests"),
    ("0.31", "vllm.v1.engine.llm_engine", "LLMEngine.set_weight_version"),
    ("0.31", "vllm.distributed", "parallel_state.destroy_model_parallel parallel_state._WORLD"),
    ("0.31", "vllm.lora.request", "LoRARequest.load_inplace"),
    ("0.31", "vllm.lora.utils", "parse_fine_tuned_lora_name"),
)
RECEIVER: tuple[Entry, ...] = (
    *LOADING,
    ("0.31", "vllm.distributed.weight_transfer.base", "WeightTransferEngine WeightTransferInitInfo WeightTransferUpdateInfo"),
    ("0.31", "vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory.register_engine"),
    ("0.31", "vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory._registry"),
    ("0.31", "vllm.lora.utils", "parse_fine_tuned_lora_name"),
)
NCCL: tuple[Entry, ...] = (
    ("0.31", "vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.broadcast PyNcclCommunicator.destroy"),
    ("0.31", "vllm.distributed.utils", "StatelessProcessGroup.create"),
    ("0.32", "vllm.utils.nccl", "unpinned_nccl_env"),
)
# Paths of a server, as its description names them.
PATHS: dict[str, str] = {
    **dict.fromkeys(("/pause", "/resume", "/update_weight_version", "/reset_prefix_cache", "/get_world_size"), "0.31"),
    **dict.fromkeys(("/server_info", "/v1/models", "/inference/v1/abort_requests"), "0.31"),
    **dict.fromkeys(("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"), "0.31"),
    **dict.fromkeys(("/start_weight_update", "/update_weights", "/finish_weight_update"), "0.31"),
}


def warn_unless_run(found: str, where: str) -> None:
    """Warn of a version of vLLM with which the tests were not run."""
    if ".".join(re.findall(r"\d+", found)[:2]) not in RUN:
        rank_zero_warn(f"{where} has vLLM {found}, with which this package was not tested; vLLM {', '.join(RUN)} was")


def check_names(entries: Iterable[Entry], found: str, where: str) -> None:
    """Import what is used of vLLM.

    Raises:
        ConfigError: If a name is missing.
    """
    for since, module, names in entries:
        for name in names.split():
            try:
                reduce(getattr, name.split("."), importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                raise _missing(f"{module}.{name}", since, found, where) from error


def check_paths(description: Any, found: str, where: str) -> None:
    """Look for what is used of a server in its description (OpenAPI).

    Raises:
        ConfigError: If something is missing.
    """
    for path, since in PATHS.items():
        if path not in description["paths"]:
            raise _missing(path, since, found, where)
    if "weight_versions" not in str(description.get("components")):
        raise _missing("weight_versions in its completions", "0.32", found, where)


def _missing(name: str, since: str, found: str, where: str) -> ConfigError:
    return ConfigError(f"{where} has vLLM {found}, which has no {name}, as vLLM {since} has; install vLLM {RUN[-1]}")

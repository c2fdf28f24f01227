"""`ServerFacts`: what a vLLM server says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


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
            config: vLLM's config.
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

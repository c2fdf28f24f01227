"""The settings of TRL that were the fastest of those tried, by workload; README.md has what was tried."""

from typing import Any

from workloads import Workload

# Of TRL's GRPOConfig, but for `attn_implementation`, which is the model's. Gradient checkpointing, a default, costs time.
_FASTEST: dict[str, Any] = {"gradient_checkpointing": False, "per_device_train_batch_size": 8, "attn_implementation": "eager"}
_OTHERS: dict[str, dict[str, Any]] = {
    "long_prompt": {
        "per_device_train_batch_size": 4,
        "attn_implementation": "sdpa",
        "generation_kwargs": {"cache_implementation": "static"},
    },
    "tiny": {"per_device_train_batch_size": 128},
}


def fastest_settings(workload: Workload) -> dict[str, Any]:
    """What changes TRL's speed and memory, and not what is computed."""
    return {**_FASTEST, **_OTHERS.get(workload.name, {})}

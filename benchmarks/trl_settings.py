"""The settings of TRL that were the fastest of those tried, by workload; README.md has what was tried."""

from typing import Any

from workloads import Workload

# Of TRL's GRPOConfig. Not its defaults: gradient checkpointing costs time, and the memory is there.
FASTEST: dict[str, Any] = {"gradient_checkpointing": False}
ROWS_AT_ONCE = {"main": 32, "ragged": 32, "long_prompt": 32, "tiny": 128, "minibatches": 8}


def fastest_settings(workload: Workload) -> dict[str, Any]:
    """Values of GRPOConfig that change the speed and not what is computed."""
    rows = ROWS_AT_ONCE[workload.name]
    return {**FASTEST, "per_device_train_batch_size": rows}

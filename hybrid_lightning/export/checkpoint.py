"""A trained policy out of a checkpoint: a file, or the folder of a sharded one, whatever strategy wrote it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.export.trained import TrainedPolicy, base_of, training_of
from hybrid_lightning.export.weights import is_trained, peft_weights
from hybrid_lightning.policy.adaptation import adapter_state
from hybrid_lightning.sharding.sharded_folder import read_weights
from hybrid_lightning.sharding.whole_files import read_content


def policy_of_checkpoint(path: str | Path, arguments: Mapping[str, Any] | None = None, datamodule: Any = None) -> TrainedPolicy:
    """Read plan and trained weights; one process does so for any number that wrote them.

    Args:
        path: File or folder.
        arguments: Of the module, by which to find the base model instead of those in the checkpoint: where it has been moved.
        datamodule: Of the training, for the model card.

    Raises:
        CheckpointError: If there is no such checkpoint, or it has no adapter.
        ConfigError: If neither the checkpoint nor `arguments` name the base model.
    """
    path = Path(path)
    content = read_content(path)
    saved = adapter_state(content)["plan"]
    if saved is None:
        raise CheckpointError(f"{path} was saved without an adapter: nothing in it has been trained; give another checkpoint")
    plan = AdapterPlan.from_dict(saved, source=str(path))
    state = (read_weights(path, is_trained) if path.is_dir() else content)["state_dict"]
    # Lightning keeps under this name what a module was made with.
    trained_with = content.get("hyper_parameters", {})
    summary = content.get("callbacks", {}).get("RunSummary")
    return TrainedPolicy(
        plan=plan,
        weights=peft_weights(state, plan, str(path)),
        base=base_of({**trained_with, **(arguments or {})}),
        training=training_of(content.get("global_step", 0), trained_with or arguments or {}, summary, datamodule),
    )

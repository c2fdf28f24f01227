"""A checkpoint's entry for a policy, besides trainable weights and the optimizer's state: its plan, base model and passes.

The entry has the key `hybrid_lightning`. With the base model, it is enough to rebuild the policy.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.sharding.parameters import name_optimizer_state, parameter_names, trained_names
from hybrid_lightning.sharding.sharded_folder import is_sharded_checkpoint, read_weights

CHECKPOINT_KEY = "hybrid_lightning"
CHECKPOINT_FORMAT = 3  # format of everything this project puts into a checkpoint; other formats are rejected


def new_state(plan: AdapterPlan | None, base_digest: str) -> dict[str, Any]:
    """A checkpoint entry with this plan and base model."""
    return {"format": CHECKPOINT_FORMAT, "plan": None if plan is None else plan.to_dict(), "base_digest": base_digest}


def adapter_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's entry with its plan and base model; CheckpointError if it is missing or has a different format."""
    if CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError("the checkpoint was not written by hybrid_lightning: it has no adapter plan and base model")
    state = checkpoint[CHECKPOINT_KEY]
    assert isinstance(state, dict)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {state.get('format')}, but this version reads format {CHECKPOINT_FORMAT}; resume with "
            "the version that wrote it, or start a new run"
        )
    return state


def save_policy(
    checkpoint: dict[str, Any], policy: Policy, passes: Passes, module: nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    """Keep only a module's trainable weights in a checkpoint, and add the entry of its policy.

    The optimizers' states are keyed by weight names.
    """
    trainable, names = trained_names(module), parameter_names(module)
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trainable}
    if optimizers:
        states = zip(checkpoint["optimizer_states"], optimizers, strict=True)
        checkpoint["optimizer_states"] = [name_optimizer_state(state, optimizer, names) for state, optimizer in states]
    runner = policy.runner
    checkpoint[CHECKPOINT_KEY] = {
        **new_state(policy.plan, policy.base_digest),
        "quantization": _quantization_name(policy),
        "keep_start_weights": policy.keep_start_weights,
        "passes": runner.passes() if runner.is_prepared else {},
        **passes.state(policy.device),
    }


def as_one_file(checkpoint: Any) -> Any:
    """A checkpoint in a form that Lightning reads: a sharded checkpoint, which is a folder, becomes a file in memory.

    Raises:
        CheckpointError: If the folder is incomplete.
    """
    if not is_sharded_checkpoint(checkpoint):
        return checkpoint
    file = io.BytesIO()
    torch.save(read_weights(Path(checkpoint)), file)
    file.seek(0)
    return file


def without_reward(error: Exception) -> str:
    """The warning for a checkpoint that is loaded without its reward, because jsonargparse did not find it."""
    found = re.search(r"^ +- (.+?)(?=^ +- |^\S|\Z)", str(error), re.MULTILINE | re.DOTALL)  # the first error that it lists
    cause = (found[1] if found else str(error)).strip().splitlines()[-1].strip()  # the innermost error
    return (
        f"the checkpoint's reward cannot be rebuilt, so the policy is loaded without it: {cause}; to score completions, call "
        "load_from_checkpoint(path, reward=...)"
    )


def restore_policy(policy: Policy, saved: Mapping[str, Any], resumes: bool, device: torch.device | None) -> None:
    """Apply the plan of a checkpoint's entry, unless it is already applied.

    Args:
        policy: A policy with the base model of the checkpoint.
        saved: The entry (see `adapter_state`).
        resumes: Whether training continues from the checkpoint.
        device: The training device; None without a run.

    Raises:
        CheckpointError: If the checkpoint was written with a different base model or plan, or trained in a different way.
    """
    if saved["base_digest"] != policy.base_digest:
        raise CheckpointError(
            f"the checkpoint belongs to a base model with digest {saved['base_digest'][:12]}, but the loaded model has "
            f"{policy.base_digest[:12]}; give the model.model, model.revision and model.dtype of the run's config.yaml"
        )
    plan = None if saved["plan"] is None else AdapterPlan.from_dict(saved["plan"])
    if plan is None:
        if policy.plan is not None:
            raise CheckpointError("the checkpoint was saved without an adapter; resume it without HybridAdapterSetup")
        return
    if resumes and saved["quantization"] != _quantization_name(policy):
        raise CheckpointError(
            f"the checkpoint was trained with model.quantization={saved['quantization'] or 'null'}, but it is now "
            f"{_quantization_name(policy) or 'null'}; give the same value, or start a new run"
        )
    if policy.plan is not None and policy.plan.digest != plan.digest:
        raise CheckpointError(
            f"the checkpoint was trained with adapter plan {plan.digest[:12]}, but plan {policy.plan.digest[:12]} is "
            "applied; remove adapter.plan (the checkpoint brings its own), or start a new run"
        )
    policy.adapt(plan, saved["keep_start_weights"], device)


def check_weights(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise CheckpointError if a checkpoint has no values for these trainable weights, or has values for these unknown ones."""
    for names, what in (
        (missing, "no values for {} trainable weights"),
        (unexpected, "{} weights that this model does not have"),
    ):
        if names:
            found = what.format(len(names))
            raise CheckpointError(f"the checkpoint has {found}, such as {names[0]!r}; it belongs to another model")


def give_up_rollout(checkpoint: Mapping[str, Any]) -> None:
    """Let the run that resumes draw the rollout in progress again (see `RolloutLoader.load_state_dict`)."""
    for state in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
        if isinstance(state, dict) and "ranks" in state:  # state of `RolloutLoader`
            state["given_up"] = True


def _quantization_name(policy: Policy) -> str | None:
    return None if policy.quantization is None else type(policy.quantization).__name__

"""Trained weights into a base model, module by module, in float32.

full:   W' = the trained weight
LoRA:   W' = W + s B A,   s = alpha / rank, rsLoRA: alpha / sqrt(rank)
DoRA:   W' = m (W + s B A) / |W + s B A|, lengths taken along each output's row
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.lora import LoraSettings
from hybrid_lightning.errors import CheckpointError, ModelError
from hybrid_lightning.export.trained import TrainedPolicy
from hybrid_lightning.export.weights import PREFIX


def merge_into(model: nn.Module, policy: TrainedPolicy, dtype: torch.dtype) -> None:
    """Put the trained weights into a base model.

    What has been trained is rounded to the wanted dtype once, from the float32 of its sum with the base's weight. One module at a
    time is in float32.

    Args:
        model: The base, loaded in the dtype of training; changed in place.
        policy: Its plan and weights.
        dtype: That all parameters have afterwards.

    Raises:
        PlanError: If these are not the weights that were adapted.
        ModelError: If a weight is not finite, or too large for the dtype.
    """
    policy.plan.check_model(model)
    policy.plan.check_weights(model)
    for name, merged in _merged(model, policy):
        owner, _, attribute = name.rpartition(".")
        value = merged.to(dtype)
        if not bool(torch.isfinite(value).all()):
            why = f"does not fit {dtype}" if bool(torch.isfinite(merged).all()) else "is not finite"
            raise ModelError(f"cannot export: the trained weight {name} {why}; take an earlier checkpoint or a wider dtype")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    for parameter in model.parameters():  # not the buffers, which are no weights
        parameter.data = parameter.data.to(dtype)


def _merged(model: nn.Module, policy: TrainedPolicy) -> Iterator[tuple[str, Tensor]]:
    """Name in the base and new value of every weight that was trained."""
    for planned in policy.plan.candidates:
        module, prefix = model.get_submodule(planned.name), f"{PREFIX}{planned.name}."
        if planned.mode == "full":
            for part in dict(module.named_parameters(recurse=False)):
                if prefix + part not in policy.weights:
                    raise CheckpointError(f"the trained weight {prefix + part!r} is missing: the checkpoint is not whole")
                yield f"{planned.name}.{part}", policy.weights[prefix + part].float()
        elif planned.mode == "lora":
            yield f"{planned.name}.weight", _with_lora(module, policy.plan.lora, policy.weights, prefix)


def _with_lora(module: nn.Module, settings: LoraSettings, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    """[outputs, inputs], or transposed where the module's weight is."""
    transposed = isinstance(module, Conv1D)
    weight = module.get_parameter("weight").detach().float()
    down, up = weights[f"{prefix}lora_A.weight"].float(), weights[f"{prefix}lora_B.weight"].float()
    weight = (weight.T if transposed else weight).addmm(up, down, alpha=settings.scale)
    if settings.use_dora:
        lengths = weights[f"{prefix}lora_magnitude_vector"].float()
        weight = weight * (lengths / torch.linalg.vector_norm(weight, dim=1))[:, None]
    return weight.T.contiguous() if transposed else weight

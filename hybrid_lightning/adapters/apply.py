"""Apply a plan to a base model: one `PeftModel` with LoRA on some modules and trainable copies of others.

PEFT matches module names loosely (by suffix, for `modules_to_save` without a dot boundary) and ignores names that it does not
find, so afterwards the wrapped modules are compared with the plan.

All trainable weights are float32: in bfloat16 small optimizer steps vanish. The base keeps its dtype. A bfloat16 base with
float32 trainable weights has to run under autocast, and merging it leaves the fully trained modules in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from hybrid_lightning.adapters.lora_settings import ADAPTER, check_lora_modules, exact_names
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError, ModelError, PlanError
from hybrid_lightning.runner import Backend, use_fused_modules


def apply_plan(model: nn.Module, plan: AdapterPlan, keep_start_weights: bool = True, backend: Backend | None = None) -> PeftModel:
    """Adapt a base model as planned. Until the first optimizer step its outputs stay the same bit for bit.

    Fully training a module includes its bias; LoRA leaves biases alone.

    Args:
        model: Base model; wrapped in place. LoRA's A matrices are drawn from torch's global random state.
        plan: Plan made for this model.
        keep_start_weights: Whether to keep the original weights of fully trained modules. The reference policy of a KL term
            (`adapter_disabled`) needs them. False saves their memory.
        backend: Backend of the model's engine; None for a model without one.

    Returns:
        The adapted model; only the adapter is trainable.

    Raises:
        ModelError: If the model already has an adapter.
        PlanError: If the plan does not fit the model, trains nothing, or has LoRA on a module that cannot have it, or if PEFT
            wrapped other modules than planned.
    """
    if any(isinstance(module, (PeftModel, BaseTunerLayer, ModulesToSaveWrapper)) for module in model.modules()):
        raise ModelError("the model already has a PEFT adapter; load the base model again and apply the plan to it")
    plan.check_model(model)
    check_lora_modules(plan.lora_modules)
    config = plan.lora_config(model)
    start = {} if keep_start_weights else _take_weights(model, plan.full_modules)
    with exact_names(model):
        adapted = get_peft_model(model, config)
    _check_wrapped(adapted, plan)
    for name, wrapper in _full_wrappers(adapted).items():
        copy = wrapper.modules_to_save[ADAPTER]
        if not keep_start_weights:
            wrapper.original_module = FreedStartWeights(name)
            for key, weight in start[name].items():
                copy.register_parameter(key, nn.Parameter(weight))
    full, lora = parameter_groups(adapted)
    for parameter in (*full.values(), *lora.values()):
        parameter.data = parameter.data.float()
    _set_dora_magnitudes(adapted)
    use_fused_modules(adapted, backend or Backend())
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable == {*full, *lora}, "PEFT made parameters outside the adapter trainable"
    return adapted


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """Make an adapted model compute as the start policy within this context, bit for bit, however far it has been trained.

    Raises:
        ConfigError: If the start weights were freed, or LoRA is currently merged into the base weights.
    """
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]
    for layer in layers:
        if isinstance(layer, ModulesToSaveWrapper) and isinstance(layer.original_module, FreedStartWeights):
            layer.original_module()  # raises the error
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ConfigError("LoRA is merged into the base weights; unmerge it before using the start policy")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:  # PEFT switches these with the adapter
            parameter.requires_grad_(flag)


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The adapter's parameters by full name, of fully trained modules and of LoRA, DoRA's magnitudes included."""
    named = dict(model.named_parameters())
    full = {name: parameter for name, parameter in named.items() if f".modules_to_save.{ADAPTER}." in name}
    lora = {name: parameter for name, parameter in named.items() if ".lora_" in name and name not in full}
    return full, lora


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, name in `state_dict` -> tensor that shares memory with the model."""
    full, lora = parameter_groups(model)
    return {name: parameter.detach() for name, parameter in {**full, **lora}.items()}


class FreedStartWeights(nn.Module):
    """Placeholder for the frozen original of a fully trained module of this name, after the original was freed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._module = name

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to compute with the start weights."""
        raise ConfigError(
            f"the start weights of {self._module} were freed, so the adapter cannot be disabled; set "
            "keep_start_weights=True (a KL term needs it, at the cost of a second copy of the fully trained modules)"
        )


def _take_weights(model: nn.Module, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Take the weights out of modules without kept originals, so that PEFT does not copy them."""
    taken = {}
    for name in names:
        module = model.get_submodule(name)
        taken[name] = {key: parameter.detach() for key, parameter in module.named_parameters(recurse=False)}
        module.to("meta")
    return taken


def lora_layers(layer: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapted module, by the name of the weight that each one adapts; with experts they are nested."""
    if not isinstance(layer, LoraLayer):
        return {}
    if not isinstance(layer, ParamWrapper):
        return {"weight": layer}
    return {layer.parameter_name: layer, **lora_layers(layer.base_layer)}


def _full_wrappers(adapted: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    modules = adapted.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _set_dora_magnitudes(adapted: PeftModel) -> None:
    """Initialize DoRA's magnitudes to the norms that its forward pass computes, in float32.

    PEFT computes them in the dtype of the base: with bfloat16 the adapted model would not start out equal to the base model.
    """
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector:
            weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
            magnitudes: Any = layer.lora_magnitude_vector[ADAPTER]
            zero_update = torch.zeros((), device=weight.device)  # B starts at zero
            with torch.no_grad():
                magnitudes.weight.copy_(magnitudes.get_weight_norm(weight, zero_update, layer.scaling[ADAPTER]))


def _check_wrapped(adapted: PeftModel, plan: AdapterPlan) -> None:
    modules = dict(adapted.get_base_model().named_modules())
    layers: dict[str, Any] = {
        name: module
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and not isinstance(modules[name.rpartition(".")[0]], ParamWrapper)
    }
    for kind, wrapped, planned in (
        ("LoRA", set(layers), set(plan.lora_modules)),
        ("full training", set(_full_wrappers(adapted)), set(plan.full_modules)),
    ):
        if wrapped != planned:
            difference = sorted(wrapped ^ planned)
            raise PlanError(
                f"PEFT set up {kind} for {len(wrapped)} modules where the plan has {len(planned)}; the first difference is "
                f"{difference[0]}: PEFT cannot distinguish module names with the same ending; give them the same mode in the plan"
            )
    for module in plan.candidates:
        if module.mode == "lora":
            lora, found = plan.lora_of(module), lora_layers(layers[module.name])
            assert set(found) == set(module.experts or ["weight"]), f"PEFT adapted other parameters of {module.name}"
            assert all((layer.r[ADAPTER], layer.scaling[ADAPTER]) == (lora.rank, lora.scale) for layer in found.values()), (
                f"PEFT gave {module.name} another rank"
            )

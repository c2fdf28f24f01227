"""Trained weights by the names that PEFT gives them in a file.

A checkpoint has `model.base_model.model.NAME.lora_A.default.weight` and `...NAME.modules_to_save.default.weight`, a PEFT file
`base_model.model.NAME.lora_A.weight` and `base_model.model.NAME.weight`, where NAME is that of the module in the base.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from hybrid_lightning.adapters.lora import ADAPTER
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule
from hybrid_lightning.errors import CheckpointError

PREFIX = "base_model.model."
_FULL = f".modules_to_save.{ADAPTER}."
_LORA = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.", f".lora_magnitude_vector.{ADAPTER}.")


def is_trained(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of the adapter, and not of the frozen base."""
    return PREFIX in name and (_FULL in name or any(part in name for part in _LORA))


def peft_weights(state: Mapping[str, Tensor], plan: AdapterPlan, source: str) -> dict[str, Tensor]:
    """Pick the adapter's weights from a state dict and name them as PEFT does in a file.

    Args:
        state: Of the adapted model, or of a module that holds it; whatever else it has is left out.
        plan: By which they were trained.
        source: Where they come from, for the error message.

    Raises:
        CheckpointError: If there are other weights than the plan's, or not in their shapes.
    """
    weights = {_peft_name(name): weight for name, weight in state.items() if is_trained(name)}
    expected = dict(_expected(plan))
    biases = {f"{PREFIX}{name}.bias" for name in plan.full_modules}  # which a module has or not
    different = sorted((expected.keys() ^ weights.keys()) - biases)
    if different:
        verb = "lacks" if different[0] in expected else "has what is not in its plan:"
        raise CheckpointError(f"{source} {verb} the trained weight {different[0]!r}; it is damaged, or not whole")
    for name, shapes in expected.items():
        if tuple(weights[name].shape) not in shapes:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, where the plan has {shapes[0]}; it is damaged, or not "
                "whole"
            )
    return weights


def _peft_name(name: str) -> str:
    name = name[name.index(PREFIX) :]
    name = name.replace(_FULL, ".").replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")


def _expected(plan: AdapterPlan) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Name and possible shapes of every weight that the plan trains, biases aside."""
    for module in plan.candidates:
        name = f"{PREFIX}{module.name}"
        outputs, inputs = module.shape
        if module.mode == "full":
            yield f"{name}.weight", [(outputs, inputs), (inputs, outputs)]  # GPT-2's Conv1D is transposed
        elif module.mode == "lora":
            yield from _expected_lora(name, module, plan)


def _expected_lora(name: str, module: PlannedModule, plan: AdapterPlan) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    outputs, inputs = module.shape
    yield f"{name}.lora_A.weight", [(plan.lora.rank, inputs)]
    yield f"{name}.lora_B.weight", [(outputs, plan.lora.rank)]
    if plan.lora.use_dora:
        yield f"{name}.lora_magnitude_vector", [(outputs,)]

"""A plan as PEFT's `LoraConfig`."""

from collections.abc import Mapping

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from hybrid_lightning.adapters.lora import LoraSettings
from hybrid_lightning.errors import PlanError


def lora_config(modes: Mapping[str, str], lora: LoraSettings, fan_in_fan_out: bool = False) -> LoraConfig:
    """Build the config that makes `get_peft_model` adapt modules as planned.

    Args:
        modes: Full module name -> `full`, `lora` or `frozen`.
        lora: Settings of the low-rank part.
        fan_in_fan_out: LoRA modules store their weights as [inputs, outputs], as GPT-2's do.

    Raises:
        PlanError: If nothing is trained, or a name ends like that of a module with another mode.
    """
    low_rank = [name for name, mode in modes.items() if mode == "lora"]
    full = [name for name, mode in modes.items() if mode == "full"]
    if not low_rank and not full:
        raise PlanError('the plan leaves all modules frozen: give at least one the mode "full" or "lora".')
    _check_ends(modes)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides by the rank
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=fan_in_fan_out,
        # with None PEFT would fill in the architecture's usual modules, and with [] it refuses to go on
        target_modules=low_rank or DUMMY_TARGET_MODULES,
        modules_to_save=full or None,
    )


def _check_ends(modes: Mapping[str, str]) -> None:
    """PEFT also trains fully what ends like the name of a fully trained module, and gives LoRA to what ends, at a dot, like that
    of a LoRA module."""
    full = tuple(name for name, mode in modes.items() if mode == "full")
    low_rank = tuple(f".{name}" for name, mode in modes.items() if mode == "lora")
    for name, mode in modes.items():
        if (mode != "full" and name.endswith(full)) or (mode == "frozen" and name.endswith(low_rank)):
            raise PlanError(
                f'PEFT would not leave {name} "{mode}", since its name ends like that of a module with another mode: give them '
                "the same mode in the plan."
            )

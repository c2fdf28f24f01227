"""Folders with nothing but an adapter, as `AdapterFolder` exports and PEFT saves them: find the base model, and merge the two."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hybrid_lightning.errors import ModelError, one_line

ADAPTER_CONFIG = "adapter_config.json"


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The model string (for `resolve_model`) and the revision of the base model of an adapter.

    Raises:
        ModelError: If the adapter's config names no base model, or the model is not there.
    """
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{str(folder / ADAPTER_CONFIG)!r} does not name its base model; set base_model_name_or_path in it")
    local = Path(base)
    if local.is_absolute() and not local.exists():
        raise ModelError(
            f"the adapter {str(folder)!r} belongs to the model {base!r}, which is not there; correct base_model_name_or_path in "
            f"its {ADAPTER_CONFIG}, or export the run as a MergedModel"
        )
    if local.is_dir() and not (local / "config.json").is_file():  # a GGUF file is named by its folder
        files = sorted(local.glob("*.gguf"))
        if len(files) != 1:
            raise ModelError(
                f"the adapter {str(folder)!r} belongs to a model in {base!r}, which has {len(files)} GGUF files and no "
                f"config.json: name the file as base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        base = str(files[0])
    return base, None if Path(base).exists() else config.get("revision")


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge an adapter into the weights of its base model, which makes an ordinary model.

    Args:
        model: The base model, changed in place.
        folder: Folder of the adapter.

    Returns:
        The merged model, in the dtype of the base.

    Raises:
        ModelError: If the adapter belongs to another model, or is damaged.
    """
    from peft import PeftConfig, get_peft_model  # slow to import
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    dtype = model.dtype
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted = get_peft_model(model, config)
        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(adapted, weights)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot put the adapter {str(folder)!r} on its base: {one_line(error)}") from error
    missing = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise ModelError(
            f"the adapter {str(folder)!r} does not fit its base model: {'it lacks' if missing else 'the base has no place for'} "
            f"{name!r}; its files are damaged, or {ADAPTER_CONFIG} names another base"
        )
    merged: PreTrainedModel = adapted.merge_and_unload().to(dtype)
    if hasattr(merged, "peft_config"):  # PEFT leaves it behind, though there is no adapter any more
        del merged.peft_config
    return merged

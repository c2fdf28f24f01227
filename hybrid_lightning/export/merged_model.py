"""`MergedModel`: exports one ordinary model with the trained weights merged into the base, module by module, in float32.

Fully trained weights are copied; low-rank updates are merged (see `adapters/merge.py`).
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybrid_lightning.adapters.candidates import is_transposed
from hybrid_lightning.adapters.merge import LowRankUpdate, write_merged
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy
from hybrid_lightning.model.loading import DTYPES, read_config
from hybrid_lightning.rollout.interface import PEFT_PREFIX


class MergedModel(ExportForm):
    """A Hugging Face model folder, which `AutoModelForCausalLM.from_pretrained` and every server can load.

    The base model is read again and held in memory once, on the CPU. After training on a quantized base, the weights are merged
    into the base before quantization.

    Args:
        dtype: Dtype of the weights: `bfloat16`, `float16` or `float32`; None for the dtype in the base's config (for a GGUF
            file, the dtype of training).

    Raises:
        ConfigError: If the dtype is not one of these.
    """

    name = "merged"
    library = "transformers"
    relation = "finetune"

    def __init__(self, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"form.dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.dtype = dtype

    def weights_dtype(self, policy: TrainedPolicy) -> str:
        """The requested dtype, or else the dtype in the base's config; for a GGUF file, which has none, the dtype of training."""
        stored = ""
        if self.dtype is None and "gguf_file" not in policy.base.source.arguments:
            with suppress(ModelError):  # the hub cannot be reached
                stored = str(read_config(policy.base.source).dtype).removeprefix("torch.")
        return self.dtype or (stored if stored in DTYPES else policy.base.dtype)

    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write model, tokenizer and generation config.

        Raises:
            PlanError: If the base model is not the one that was adapted.
            ModelError: If a weight is not finite in this dtype.
        """
        model = policy.base.load()
        merge_into(model, policy, DTYPES[self.weights_dtype(policy)])
        _set_generation(model, policy)
        model.save_pretrained(folder)
        policy.base.trained_tokenizer.save_pretrained(folder)

    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Python code that loads the folder like any other model."""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this one\n'
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        )


def merge_into(model: nn.Module, policy: TrainedPolicy, dtype: torch.dtype) -> None:
    """Merge the trained weights of a policy into its base model.

    Changes the model, loaded in the dtype of training, in place, and converts all its parameters to `dtype`. Each merged weight
    is computed in float32 and rounded once. Only one module at a time is in float32.

    Raises:
        PlanError: If the model does not have the weights that were adapted.
        ModelError: If a weight is not finite, or too large for the dtype.
    """
    policy.plan.check_model(model)
    policy.plan.check_weights(model)
    for name, merged in _merged_weights(model, policy):
        owner, _, attribute = name.rpartition(".")
        value = merged.to(dtype)
        if not bool(torch.isfinite(value).all()):
            why = f"does not fit {dtype}" if bool(torch.isfinite(merged).all()) else "is not finite"
            raise ModelError(f"cannot export: the trained weight {name} {why}; use an earlier checkpoint or a wider dtype")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    for parameter in model.parameters():  # buffers keep their dtype
        parameter.data = parameter.data.to(dtype)


def _merged_weights(model: nn.Module, policy: TrainedPolicy) -> Iterator[tuple[str, Tensor]]:
    """Name in the base model and merged value, in float32, of each trained weight."""
    for planned in policy.plan.candidates:
        module, prefix = model.get_submodule(planned.name), f"{PEFT_PREFIX}{planned.name}."
        if planned.mode == "full":
            for part in dict(module.named_parameters(recurse=False)):
                yield f"{planned.name}.{part}", policy.weights[prefix + part].float()
        elif planned.mode == "lora":
            settings, weights = policy.plan.lora_of(planned), policy.weights
            for part, layer in planned.lora_layers().items():
                weight, prefix = module.get_parameter(part).detach(), f"{PEFT_PREFIX}{layer}."
                magnitudes = weights[f"{prefix}lora_magnitude_vector"] if settings.use_dora else None
                update = LowRankUpdate(
                    weights[f"{prefix}lora_A.weight"], weights[f"{prefix}lora_B.weight"], settings.scale, magnitudes
                )
                if weight.dim() == 3:
                    update = update.of_experts(len(weight))
                merged = torch.empty(weight.shape, dtype=torch.float32)  # as it is stored
                write_merged(merged, 0, weight, update, transposed=is_transposed(module))
                yield f"{planned.name}.{part}", merged


def _set_generation(model: PreTrainedModel, policy: TrainedPolicy) -> None:
    """Make `generate` stop at the stop tokens of training; the sampling parameters stay the base model's."""
    settings, stops = model.generation_config, policy.base.stop_ids
    assert settings is not None
    if policy.training.arguments.get("environment") is not None:  # turns of an episode may end with additional tokens
        stops = TurnEncoder(policy.base.encoder, stops).stop_ids
    settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    if settings.pad_token_id is None:
        settings.pad_token_id = policy.base.tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:
        # Many base models have a temperature without do_sample, which transformers reads but refuses to write.
        settings.do_sample = True

"""`MergedModel`: exports one ordinary model with the trained weights merged into the base, module by module, in float32.

Fully trained weights are copied; low-rank updates are merged (see `adapters/merge.py`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid_lightning.adapters.candidates import is_transposed
from hybrid_lightning.adapters.merge import LowRankUpdate, write_merged
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.export.trained import PEFT_PREFIX, ExportForm, TrainedPolicy
from hybrid_lightning.model.loading import DTYPES, stop_token_ids
from hybrid_lightning.model.prompts import PromptEncoder


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
        """The requested dtype, or else the dtype in the base's config."""
        return self.dtype or policy.base.stored_dtype()

    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write model, tokenizer and generation config.

        Raises:
            PlanError: If the base model is not the one that was adapted.
            ModelError: If a weight is not finite in this dtype.
        """
        tokenizer = policy.base.tokenizer()
        model = policy.base.load()
        merge_into(model, policy, DTYPES[self.weights_dtype(policy)])
        _set_generation(model, tokenizer, policy.training.arguments)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

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


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained_with: Mapping[str, Any]) -> None:
    """Make `generate` stop at the stop tokens of training; the sampling parameters stay the base model's."""
    settings = model.generation_config
    assert settings is not None
    stops = stop_token_ids(model.generation_config, tokenizer)
    if trained_with.get("environment") is not None:  # turns of an episode may end with additional tokens
        encoder = PromptEncoder(tokenizer, chat_template_kwargs=trained_with.get("chat_template_kwargs"))
        stops = TurnEncoder(encoder, stops).stop_ids
    settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:
        # Many base models have a temperature without do_sample, which transformers reads but refuses to write.
        settings.do_sample = True

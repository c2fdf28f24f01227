"""Trained weights into a base model, module by module, in float32.

full:   W' = the trained weight
LoRA:   W' = W + s B A,   s = alpha / rank, rsLoRA: alpha / sqrt(rank)
DoRA:   W' = m (W + s B A) / |W + s B A|, lengths taken along each output's row

`MergedModel`: one ordinary model with all that was trained in its weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.errors import CheckpointError, ConfigError, ModelError
from hybrid_lightning.export.trained import PREFIX, ExportForm, TrainedPolicy
from hybrid_lightning.policy.loading import DTYPES, stop_token_ids


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


class MergedModel(ExportForm):
    """A Hugging Face model folder, which `AutoModelForCausalLM.from_pretrained` and every server load.

    The base is read anew and kept in memory once, on the CPU. A run on a quantized base is merged into the 16-bit one.

    Args:
        dtype: Of the weights: `bfloat16`, `float16` or `float32`; None takes that of the base's files (of a GGUF file, that of
            training), so that nothing is rounded that was not before.

    Raises:
        ConfigError: If the dtype is another.
    """

    name = "merged"
    library = "transformers"
    relation = "finetune"

    def __init__(self, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"form.dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.dtype = dtype

    def weights_dtype(self, policy: TrainedPolicy) -> str:
        """What was asked for, or that of the base's files."""
        return self.dtype or policy.base.stored_dtype()

    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write model, tokenizer and generation config.

        Raises:
            PlanError: If the base is not the one that was adapted.
            ModelError: If a weight is not finite in this dtype.
        """
        tokenizer = policy.base.tokenizer()
        model = policy.base.load()
        merge_into(model, policy, DTYPES[self.weights_dtype(policy)])
        _set_generation(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Like every model."""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this one\n'
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        )


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` stop where completions stopped in training; the sampling parameters stay the base's."""
    settings = model.generation_config
    assert settings is not None
    stops = stop_token_ids(model.generation_config, tokenizer)
    settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:
        # Many bases name a temperature without do_sample, which transformers reads but does not write.
        settings.do_sample = True

"""`MergedModel`: one ordinary model with all that was trained in its weights."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.form import ExportForm
from hybrid_lightning.export.merge import merge_into
from hybrid_lightning.export.trained import TrainedPolicy
from hybrid_lightning.policy.loading import DTYPES, stop_token_ids


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

"""`Pretrained`: the config, tokenizer and weights that a policy starts from; each is read on first use.

So the command line can refuse a wrong column or setting before the weights are read, which takes longest (see `Trainer.check`).
"""

from contextlib import suppress
from copy import copy, deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, ModelError, one_line
from hybrid_lightning.model.loading import (
    DTYPES,
    check_weights,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from hybrid_lightning.model.prompts import PromptEncoder


class Pretrained:
    """Config, tokenizer and weights of a causal language model.

    Takes the arguments of `PolicyModule`.

    Raises:
        ConfigError: If the dtype is unknown.
        ModelError: If the model cannot be found. The properties also raise it if they cannot read their part.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"model.dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.model, self.revision, self.source = model, revision, resolve_model(model, revision)
        self.dtype, self.attn_implementation = dtype, attn_implementation
        self.chat_template, self.chat_template_kwargs = chat_template, chat_template_kwargs

    @property
    def name(self) -> str:
        """Public name: the hub id, or the name of the folder or file."""
        path = Path(self.model).expanduser()
        return path.absolute().name if path.exists() else self.model

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config: sizes and architecture of the model."""
        return load_config(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Renders prompts by the chat template, and tokenizes them."""
        return PromptEncoder(self.tokenizer, self.chat_template, self.chat_template_kwargs)

    @property
    def trained_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer with the chat template of training, for an export."""
        tokenizer = deepcopy(self.tokenizer)
        tokenizer.chat_template = self.encoder.chat_template or tokenizer.chat_template
        return tokenizer

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a completion: the end-of-sequence tokens of the tokenizer and of the model's generation config."""
        configured = load_generation_config(self.source, self.config).eos_token_id
        ids = configured if isinstance(configured, (list, tuple)) else [configured]
        return sorted({int(self.tokenizer.eos_token_id), *(token for token in ids if token is not None)})

    def clone_for_thread(self) -> Self:
        """This model for another thread, with a tokenizer that is read again."""
        other = copy(self)
        for name in ("tokenizer", "encoder"):
            with suppress(AttributeError):  # it has not been read yet
                delattr(other, name)
        return other

    def reading_as(self, other: "Pretrained", dtype: str | None) -> Self:
        """This model with the prompts of another model and, if `dtype` is None, with its dtype."""
        made = copy(self)
        made.dtype, made.encoder = dtype or other.dtype, other.encoder
        return made

    def check(self) -> None:
        """Raise ModelError unless all files of a usable policy are there; skips a GGUF file, which would take seconds."""
        if "gguf_file" not in self.source.arguments:
            _ = self.config
            check_weights(self.source)

    def load(self) -> PreTrainedModel:
        """Load the model with its weights, frozen and in eval mode."""
        _ = self.tokenizer  # a model without one is refused before its weights are read
        return load_model(self.source, self.dtype, self.attn_implementation, self.config)

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        return meta_model(self.config, DTYPES[self.dtype])


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a config's model on the meta device; ModelError if transformers does not have it."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot build a causal language model from this config: {one_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()

"""`Pretrained`: the model that a policy starts from. Its parts are read when they are first asked for.

So the command line can refuse a wrong column or setting before the weights are read, which takes longest (see `Trainer.check`).
"""

from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hybrid_lightning.policy.loading import (
    check_dtype,
    check_weights,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
from hybrid_lightning.policy.prompts import PromptEncoder


class Pretrained:
    """Config, tokenizer and weights of a causal language model.

    Args:
        model: See `LanguageModule`, like all the others.
        revision: Of a hub model.
        dtype: Of the weights in memory, by name.
        attn_implementation: Of the attention.
        chat_template: Of chat prompts.
        chat_template_kwargs: Variables of the template.

    Raises:
        ConfigError: If the dtype is unknown.
        ModelError: If there is no such model; each part raises it too, if it cannot be read.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        dtype: str,
        attn_implementation: str | None,
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> None:
        check_dtype(dtype)
        self.source = resolve_model(model, revision)
        self.dtype, self.attn_implementation = dtype, attn_implementation
        self.chat_template, self.chat_template_kwargs = chat_template, chat_template_kwargs

    @cached_property
    def config(self) -> PretrainedConfig:
        """Sizes and architecture."""
        return load_config(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Between text and token ids."""
        return load_tokenizer(self.source)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """From a prompt to token ids, by tokenizer and chat template."""
        return PromptEncoder(self.tokenizer, self.chat_template, self.chat_template_kwargs)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a completion."""
        return stop_token_ids(load_generation_config(self.source, self.config), self.tokenizer)

    def check(self) -> None:
        """Make sure that the model and all its files are there; of a GGUF file that would take seconds, so it is not done.

        Raises:
            ModelError: If something is not there.
        """
        if "gguf_file" not in self.source.arguments:
            _ = self.config
            check_weights(self.source)

    def load(self) -> PreTrainedModel:
        """The model with its weights, frozen and in eval mode."""
        _ = self.tokenizer  # a model without one is refused before its weights are read
        return load_model(self.source, self.dtype, self.attn_implementation, self.config)

    def skeleton(self) -> nn.Module:
        """The modules of the model without weights, on the meta device."""
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(deepcopy(self.config))
        return model

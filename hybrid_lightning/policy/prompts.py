"""From `Prompt` to token ids, by the policy's tokenizer and chat template."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Prompt


class PromptEncoder:
    """Renders and tokenizes prompts.

    Args:
        tokenizer: The policy's tokenizer.
        chat_template: Jinja template for prompts with messages; None takes the tokenizer's own.
        chat_template_kwargs: Extra variables of the template, such as `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def render(self, prompt: Prompt) -> str:
        """The exact text that the model is given.

        Raises:
            ConfigError: If the prompt has messages, and there is no chat template or it refuses them.
        """
        if prompt.messages is None:
            assert prompt.text is not None
            return prompt.text
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ConfigError(
                "the prompts are chat messages, but the tokenizer has no chat template; set model.chat_template or use "
                "data.format=PlainFormat"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt.messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                **self.chat_template_kwargs,
            )
        except TemplateError as error:  # such as a template without a system role
            raise ConfigError(
                f"the chat template refuses the prompt of {_place(prompt)}: {error}; change data.format or model.chat_template"
            ) from error
        assert isinstance(text, str)
        return text

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, without any end-of-sequence token that the tokenizer would append.

        Raises:
            DataError: If there are none, since a model can complete nothing but tokens.
        """
        # A chat template writes the special tokens itself.
        ids = list(self.tokenizer(self.render(prompt), add_special_tokens=prompt.messages is None)["input_ids"])
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and prompt.messages is None:
            ids.pop()
        if not ids:
            raise DataError(f"the prompt of {_place(prompt)} is empty; remove the row, or give data.format a template with text")
        return ids


def _place(prompt: Prompt) -> str:
    return f"{prompt.source or 'the data'} row {prompt.index}"

"""`PromptEncoder`: from prompts, and from completions in the data, to token ids by tokenizer and chat template."""

from collections.abc import Sequence
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
            return self._apply_template(list(prompt.messages), add_generation_prompt=True)
        except TemplateError as error:  # such as a template without a system role
            change = "change data.format"
            if type(error) is TemplateError and any(message["role"] == "system" for message in prompt.messages):
                change += " (for no system role: system_prompt=null, and template='Reason step by step. {question}' or the like)"
            raise ConfigError(
                f"the chat template refuses the prompt of {prompt.place}: {error}; {change} or model.chat_template"
            ) from error

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, without the end-of-sequence token that some tokenizers append.

        Raises:
            DataError: If the tokenizer cannot encode the prompt, or the prompt has no tokens, which no model can complete.
        """
        text = self.render(prompt)
        try:
            # A chat template writes the special tokens itself.
            ids = list(self.tokenizer(text, add_special_tokens=prompt.messages is None)["input_ids"])
        except Exception as error:  # tokenizers without an "unknown" token have no error class of their own
            raise DataError(
                f"the tokenizer cannot encode the prompt of {prompt.place}, which begins {text[:60]!r}: {error}; the model's "
                "vocabulary lacks a part of it, so take another model, other data or another data.format, system_prompt "
                "included (the embedded policy knows digits and signs alone)"
            ) from error
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and prompt.messages is None:
            ids.pop()
        if not ids:
            raise DataError(f"the prompt of {prompt.place} is empty; remove the row, or give data.format a template with text")
        return ids

    def encode_completion(self, prompt: Prompt, text: str, stop_ids: Sequence[int]) -> list[int]:
        """Token ids of a completion in the data, with the token that ends it: the same ids as if the policy had sampled it.

        The completion is tokenized by itself, since the policy, too, samples it after the prompt's tokens. In a chat it is what
        the template writes for the assistant's turn, up to the last token that ends a completion.

        Args:
            prompt: The prompt of the completion.
            text: The completion.
            stop_ids: Tokens that end a completion.

        Raises:
            ConfigError: If the chat template changes the text of the prompt once an answer follows.
            DataError: If the completion has no tokens.
        """
        if prompt.messages is not None:
            asked, whole = self.render(prompt), self._render_answered(prompt, text)
            if not whole.startswith(asked):
                raise ConfigError(
                    f"the chat template writes the prompt of {prompt.place} otherwise once it is answered, so that "
                    "completions could not be told from prompts; set model.chat_template to one that adds the answer behind "
                    "the prompt"
                )
            text = whole.removeprefix(asked)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise DataError(f"a completion of {prompt.place} has no tokens; correct or remove the row")
        last = max((place for place, token in enumerate(ids) if token in stop_ids), default=None)
        if prompt.messages is not None and last is not None:
            return ids[: last + 1]  # a template may write a line break behind it, which the policy need not learn
        return ids if ids[-1] in stop_ids else [*ids, int(self.tokenizer.eos_token_id)]

    def _render_answered(self, prompt: Prompt, text: str) -> str:
        messages = [*(prompt.messages or ()), {"role": "assistant", "content": text}]
        try:
            return self._apply_template(messages)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template refuses the answer of {prompt.place}: {error}; change model.chat_template"
            ) from error

    def _apply_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **self.chat_template_kwargs, **options
        )
        assert isinstance(text, str)
        return text

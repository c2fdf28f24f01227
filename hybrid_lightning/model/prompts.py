"""`PromptEncoder`: encodes prompts, and completions in the data, as token ids by tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Prompt

KEEP_HISTORY = "keep_history"  # as a chat template: the tokenizer's own, but every assistant turn stays as it was
# Stands for the turns before the ones that are added (see `TurnEncoder`).
ASKED = {"role": "user", "content": "QUESTION"}
ANSWERED = {"role": "assistant", "content": "ANSWER-OF-THE-POLICY"}
# A template that calls another one, which it holds as a macro. It writes each assistant turn as it is. Messages between two
# assistant turns are written as the other template writes them after any answer, so later turns never change earlier text.
# Servers take some parts of a turn out of its text (calls and thoughts); the other template puts them back. What follows a call,
# its end included, is what follows a call of the same tool whose argument is the placeholder. A turn that is given in parts has
# its own opening where it does not begin as the template opens turns: such as one without a thought, after `<think>`.
_KEEPING = """{%%- macro _original(messages, add_generation_prompt) %%}
%(template)s{%%+ endmacro -%%}
{%%- macro _behind(said, end, messages, add_generation_prompt) -%%}
    {%%- if said is none -%%}
        {{- _original(messages, add_generation_prompt) -}}
    {%%- else -%%}
        {{- _original([%(asked)s, said] + messages, add_generation_prompt).split('%(answer)s', 1)[1][(end | length):] -}}
    {%%- endif -%%}
{%%- endmacro -%%}
{%%- set state = namespace(new=[], said=none, end='') -%%}
{%%- for message in messages -%%}
    {%%- if message.role != 'assistant' -%%}
        {%%- set state.new = state.new + [message] -%%}
    {%%- else -%%}
        {%%- set turn = namespace(said=%(answered)s, text=message.content, calls=[], opened=true, end='') -%%}
        {%%- if message.tool_calls or message.reasoning_content or message.reasoning or message.thinking -%%}
            {%%- set whole = _original([%(asked)s, message], false) -%%}
            {%%- set before = _original([%(asked)s], true) -%%}
            {%%- set turn.opened = whole.startswith(before) -%%}
            {%%- set usual = before[(_original([%(asked)s], false) | length):] -%%}
            {%%- set closed = _behind(state.said, state.end, state.new, false) -%%}
            {%%- set opening = _behind(state.said, state.end, state.new, true)[(closed | length):] -%%}
            {%%- set before = before if turn.opened else _original([%(asked)s], false) -%%}
            {%%- set turn.opened = turn.opened and opening in ['', usual] -%%}
            {%%- if not whole.startswith(before) -%%}
                {{- raise_exception('give thoughts and calls of the assistant as a part of its content') -}}
            {%%- endif -%%}
            {%%- for call in message.tool_calls or [] -%%}
                {%%- set function = call.function or call -%%}
                {%%- set value = '%(answer)s' if function.arguments is string else {'value': '%(answer)s'} -%%}
                {%%- set function = {'name': function.name, 'arguments': value} -%%}
                {%%- set turn.calls = turn.calls + [{'type': 'function', 'id': call.id, 'function': function}] -%%}
            {%%- endfor -%%}
            {%%- set called = {'role': 'assistant', 'content': '', 'tool_calls': turn.calls} -%%}
            {%%- if turn.calls and '%(answer)s' in _original([%(asked)s, called], false) -%%}
                {%%- set turn.said = called -%%}
                {%%- set turn.end = _behind(called, '', [], false) -%%}
                {%%- set turn.text = whole[(before | length):] -%%}
            {%%- else -%%}
                {%%- set end = _behind(turn.said, '', [], false) -%%}
                {%%- set turn.text = whole[(before | length):(whole | length) - (end | length)] -%%}
            {%%- endif -%%}
        {%%- endif -%%}
        {{- _behind(state.said, state.end, state.new, turn.opened) -}}
        {{- turn.text -}}
        {%%- set state.new, state.said, state.end = [], turn.said, turn.end -%%}
    {%%- endif -%%}
{%%- endfor -%%}
{{- _behind(state.said, state.end, state.new, add_generation_prompt | default(false)) -}}
"""


def chosen_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """The Jinja template for a `chat_template`, perhaps `KEEP_HISTORY`; None for the tokenizer's own, if it has one."""
    if chat_template != KEEP_HISTORY or tokenizer.chat_template is None:
        return None if chat_template == KEEP_HISTORY else chat_template
    # Jinja drops one line break at the end of a template, but not at the end of a macro.
    own = tokenizer.get_chat_template().removesuffix("\n")
    return _KEEPING % {"template": own, "asked": ASKED, "answered": ANSWERED, "answer": ANSWERED["content"]}


class PromptEncoder:
    """Renders and tokenizes prompts; takes the templates and template variables of `PolicyModule`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chosen_template(tokenizer, chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self.chat_template is not None or self.tokenizer.chat_template is not None

    @property
    def template_text(self) -> str | None:
        """The chat template; None if there is none."""
        return self.chat_template or self.tokenizer.chat_template

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether the template ignores or rejects a content that is a text, and renders it as a list of parts."""
        rendered = []
        for content in (ASKED["content"], [{"type": "text", "text": ASKED["content"]}]):
            try:
                rendered.append(ASKED["content"] in self.apply_template([{**ASKED, "content": content}]))
            except (TemplateError, TypeError):
                rendered.append(False)
        return rendered == [False, True]

    def check_contents(self) -> None:
        """Check that the chat template takes texts; ConfigError if contents must be lists of parts."""
        if self._takes_parts_alone:
            raise ConfigError(
                'the chat template takes contents only as lists of parts, such as [{"type": "text", "text": "..."}], but the '
                "contents of messages are texts here; set model.chat_template to a template that takes texts"
            )

    def render(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The exact text for the model; the chat template receives the JSON schemas of tools.

        Raises:
            ConfigError: If the prompt has messages, and there is no chat template, or it refuses them or takes no texts.
        """
        if prompt.messages is None:
            assert prompt.text is not None
            return prompt.text
        if not self.has_template:
            raise ConfigError(
                "the prompts are chat messages, but the tokenizer has no chat template; set model.chat_template or use "
                "data.format=PlainFormat"
            )
        self.check_contents()
        try:
            return self.apply_template(prompt.messages, tools)
        except TemplateError as error:  # such as a template without a system role
            change = "change data.format"
            if type(error) is TemplateError and any(message["role"] == "system" for message in prompt.messages):
                change += " (for no system role: system_prompt=null, and template='Reason step by step. {question}' or the like)"
            raise ConfigError(
                f"the chat template refuses the prompt of {prompt.place}: {error}; {change} or model.chat_template"
            ) from error

    def encode(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = (), mark: str = "") -> list[int]:
        """Token ids of a prompt, without the end-of-sequence token that some tokenizers append (see `render` and `tokenize`).

        Raises:
            DataError: If the tokenizer cannot encode the prompt, or the prompt has no tokens, which no model can complete.
        """
        text = self.render(prompt, tools)
        try:
            # A chat template writes the special tokens itself.
            ids = self.tokenize(text, mark, add_special_tokens=prompt.messages is None)
        except Exception as error:  # tokenizers without an "unknown" token have no error class of their own
            begin = text.replace(mark, "")[:60]
            raise DataError(
                f"the tokenizer cannot encode the prompt of {prompt.place}, which begins {begin!r}: {error}; a part of it is not "
                "in the model's vocabulary: use another model, other data, or another data.format or system_prompt (the "
                "embedded policy knows only digits and signs)"
            ) from error
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and prompt.messages is None:
            ids.pop()
        if not ids:
            raise DataError(f"the prompt of {prompt.place} is empty; remove the row, or give data.format a template with text")
        return ids

    def tokenize(self, text: str, mark: str = "", add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. It is cut at each `mark`, if there are any, and the mark is left out: no token spans it."""
        first, *others = text.split(mark) if mark else [text]
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for part in others:
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def encode_completion(self, prompt: Prompt, text: str, stop_ids: Sequence[int]) -> list[int]:
        """Token ids of a completion in the data, with the token that ends it: the same ids as if the policy had sampled it.

        The completion is tokenized by itself, since the policy also samples it after the prompt's tokens. In a chat it is the
        text that the template writes for the assistant's turn, up to the last token that ends a completion.

        Raises:
            ConfigError: If the chat template changes the text of the prompt once an answer follows it.
            DataError: If the completion has no tokens.
        """
        if prompt.messages is not None:
            before, answer = self.render(prompt), {"role": "assistant", "content": text}
            try:
                whole = self.apply_template([*prompt.messages, answer], add_generation_prompt=False)
            except TemplateError as error:
                raise ConfigError(
                    f"the chat template refuses the answer of {prompt.place}: {error}; change model.chat_template"
                ) from error
            if not whole.startswith(before):
                raise ConfigError(
                    f"the chat template changes the prompt of {prompt.place} once an answer follows it, so completions cannot "
                    "be separated from prompts; set model.chat_template to one that appends the answer to the prompt"
                )
            text = whole.removeprefix(before)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise DataError(f"a completion of {prompt.place} has no tokens; correct or remove the row")
        last = max((place for place, token in enumerate(ids) if token in stop_ids), default=None)
        if prompt.messages is not None and last is not None:
            return ids[: last + 1]  # a template may add a line break, which the policy need not learn
        return ids if ids[-1] in stop_ids else [*ids, int(self.tokenizer.eos_token_id)]

    def apply_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = True
    ) -> str:
        """Render messages by the chat template; TemplateError of Jinja if it refuses them."""
        variables = {**self.chat_template_kwargs, **({"tools": list(tools)} if tools else {})}
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
        assert isinstance(text, str)
        return text

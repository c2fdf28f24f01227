"""`TemplateTrial`: tries, before a run, whether a chat template can add messages and keep the turns before them as they were.

It plays two turns by all ways in which an answer may reach a template: as a text, and in parts as servers give them (a thought,
calls of tools). The template must write the first turn as if nothing followed, and the second one like the first.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from hybrid_lightning.model.prompts import ANSWERED, ASKED, KEEP_HISTORY, PromptEncoder
from hybrid_lightning.types import Message

NEW = "NEW-CONTENT"  # stands for the text of a new message
_ANSWER = ANSWERED["content"]
_NAME = "NAME"  # name of a tool, or of its call
_THOUGHT, _TEXT = "THOUGHT", "TEXT"
_IN_PARTS = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT)  # templates differ in the name
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_HEADS: tuple[list[dict[str, str]], ...] = ([ASKED], [{"role": "system", "content": "SYSTEM"}, ASKED])
_Turn = tuple[dict[str, Any], Message, str | None]  # an answer, a message that follows it, the answer's text if it is known
REFUSED = (TemplateError, TypeError)  # TypeError: a template adds a text to something else


def new_message(role: str) -> Message:
    """A new message of a role, as an environment may add one."""
    return {"role": role, "content": NEW, **({"name": _NAME} if role == "tool" else {})}


class TemplateTrial:
    """Renders short conversations by a chat template, for `TurnEncoder`.

    Args:
        encoder: Renders conversations.
        tools: JSON schemas of the tools that the policy may call.
    """

    def __init__(self, encoder: PromptEncoder, tools: Sequence[dict[str, Any]]) -> None:
        self._encoder, self._tools = encoder, tools
        self._faults: dict[str, str] = {}
        self.after_calls = False  # whether the template renders tool results after a call, and otherwise or not after any answer
        self.empty_thought = ""  # what the template may write before an answer without a thought

    def after_answer(self, new: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The template's text after an answer: the end of the turn, and new messages."""
        return self._render([ASKED, self._answered(new), *new], add_generation_prompt).partition(_ANSWER)[2]

    def attempt(self, new: Sequence[Message], add_generation_prompt: bool = True) -> str | None:
        """The template's text after an answer; None if the template rejects the messages."""
        try:
            return self.after_answer(new, add_generation_prompt)
        except REFUSED:
            return None

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template shows the tools."""
        return bool(self._tools) and self._render([ASKED]) != self._encoder.apply_template([ASKED])

    def fault(self, role: str) -> str:
        """Why the template cannot add messages of a role; "" if it can."""
        if role not in self._faults:
            self._faults[role] = self._find_fault(role)
        return self._faults[role]

    def change(self, roles: Sequence[str]) -> str:
        """How the template changes earlier turns when messages of these roles follow, one after each turn; "" if it does not."""
        for head in _HEADS:
            try:
                opened = self._render(head)
                if any(message["content"] not in opened for message in head):
                    continue
                for turns in self._ways(roles, opened):
                    if not self._keeps([*head], opened, turns):
                        thoughtful = "think>" in opened or any(_THOUGHT in str(turn) for turn, *_ in turns)
                        what = "drops or changes the thoughts in" if thoughtful else "changes"
                        return (
                            f"the chat template {what} earlier turns when a message of role {roles[-1]!r} follows, but training "
                            f"needs turns as they were sampled; set model.chat_template={KEEP_HISTORY}, which keeps them, also "
                            "in the exported model"
                        )
            except REFUSED as error:
                if len(head) == 1:
                    return f"the chat template rejects a conversation of two turns: {error}; change model.chat_template"
                # A system role is optional.
        return ""

    # ---- parts

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        return self._encoder.apply_template(messages, self._tools, add_generation_prompt)

    def _called(self, name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": {"value": _ANSWER}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": _NAME, "function": function}]}

    def _answered(self, new: Sequence[Message]) -> dict[str, Any]:
        """The placeholder answer before new messages: a call, if a tool's result needs one."""
        result = self.after_calls and new and new[0]["role"] == "tool"
        return self._called(new[0].get("name", _NAME)) if result else ANSWERED

    def _find_fault(self, role: str) -> str:
        new = new_message(role)
        rest = self.attempt([new])
        if role == "tool" and self._tools:
            self.after_calls = True
            after_call = self.attempt([new]) or ""
            self.after_calls = NEW in after_call and (rest is None or NEW not in rest or not after_call.endswith(rest))
            rest = after_call if self.after_calls else rest
        if rest is None or NEW not in rest:
            return f"the chat template cannot render a message of role {role!r} after an answer; change model.chat_template"
        if role not in ("user", "system") and not self._tools:
            # A role that is rendered like any word means nothing to the model, unless its template shows tools.
            other = self.attempt([{**new, "role": "unknown"}])
            if other is not None and other.replace("unknown", role) == rest:
                return f"the chat template does not know the role {role!r}; change model.chat_template"
        return self.change([role])

    def _ways(self, roles: Sequence[str], opened: str) -> Iterator[list[_Turn]]:
        """The turns before messages of these roles, once for each way in which an answer may reach the template."""
        news = [new_message(role) for role in roles]
        calls = [new["role"] == "tool" and bool(self._tools) for new in news]
        for text in _answers(opened, self._encoder.template_text or ""):
            if not (self.after_calls and any(calls)):
                yield [({"role": "assistant", "content": text}, new, text) for new in news]
        for parts in ({}, _IN_PARTS):
            answers = [self._called(_NAME) if call else {"role": "assistant", "content": _TEXT} for call in calls]
            yield [({**answer, **parts}, new, None) for answer, new in zip(answers, news, strict=True)]

    def _keeps(self, head: list[Any], opened: str, turns: Sequence[_Turn]) -> bool:
        """Whether the template writes turns, played twice, as it wrote each alone; True if no policy samples such turns."""
        expected, opening, messages = opened, "", list(head)
        for turn, new, text in (*turns, *turns):
            alone = self._alone(head, turn)
            thoughtful, rest, closed = _THOUGHT in str(turn), self.after_answer([new]), self.after_answer([new], False)
            if text is None:
                if not alone.startswith(opened) or (thoughtful and _THOUGHT not in alone[len(opened) :]):
                    return True  # the policy samples after `opened`, and the template takes its thoughts in another way
                text = self._render([*head, turn, new]).removeprefix(opened).removesuffix(rest)
                if not opened.endswith(opening):  # the template opens later turns in another way than the first one
                    if not text.startswith(opening):
                        return True
                    text = text.removeprefix(opening)
            if thoughtful and _THOUGHT not in text:
                return False
            if "<think>" not in opened + text:
                self._note_empty_thought(alone)
            expected, opening = expected + text + rest, rest.removeprefix(closed) if rest.startswith(closed) else ""
            messages += [turn, new]
        whole = self._render(messages)
        if "<think>" not in expected:  # an empty thought before an answer without one loses nothing
            self._note_empty_thought(whole)
            whole = _EMPTY_THOUGHT.sub("", whole)
        return whole == expected

    def _alone(self, head: list[Any], turn: dict[str, Any]) -> str:
        """A conversation that ends with a turn; "" if the template rejects it."""
        try:
            return self._render([*head, turn], add_generation_prompt=False)
        except REFUSED:
            return ""

    def _note_empty_thought(self, rendered: str) -> None:
        found = _EMPTY_THOUGHT.search(rendered)
        self.empty_thought = self.empty_thought or (found[0] if found else "")


def _answers(opened: str, template: str) -> list[str]:
    """Possible texts of a policy after the template's opening of a turn: with and without a thought."""
    thought = f"{_THOUGHT}\n</think>\n\n{_TEXT}"
    if opened.rstrip().endswith("<think>"):
        return [thought]
    if opened.rstrip().endswith("</think>"):
        return [_TEXT]
    channels = [f"<|channel>thought\n{_THOUGHT}\n<channel|>{_TEXT}"] if "<|channel>" in template else []
    return [_TEXT, f"<think>\n{thought}", *channels]

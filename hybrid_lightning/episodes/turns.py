r"""`TurnEncoder`: the tokens of an episode, in which a policy and an environment take turns.

    ids = first(prompt, start)           the prompt and the environment's first messages, up to the policy's opening
    ids += sampled                       the policy's sample: its token ids are kept as sampled, never recomputed from text
    ids += added(prompt, new, sampled)   everything between this turn and the next one

The added text is the difference of two renderings: a conversation up to an answer, and the same conversation with the answer, the
end of its turn and the new messages, up to the policy's next opening. If the policy sampled a part of the turn's end itself, only
the rest is added.

The rendered conversation is a short one, with a placeholder word instead of the answer. So each turn costs the same however long
the episode is, and nothing depends on the policy's text, which a template may trim, strip of thoughts or reject, and which may
end within a character or look like a part of the template. If a template renders a tool's result only after a call, the word is
an argument of a call. Before the run, `check` tests that the difference is the same after any conversation: it rejects a template
that changes earlier turns when messages follow, such as one that drops their thoughts.

In environment messages, special tokens such as `<|im_end|>` are plain text and do not end a turn. Such a text is split inside
these tokens before it is rendered, and then tokenized in parts.

Plain-text prompts have no chat template; `turn_template` formats the messages that follow them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.episodes.template_trial import NEW, REFUSED, TemplateTrial, new_message
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.model.prompts import KEEP_HISTORY, PromptEncoder
from hybrid_lightning.types import Message, Prompt

TURN_TEMPLATE = "\n{content}\n"
# Tokens with which models end a turn that calls a tool: Llama 3, gpt-oss, Gemma 4, GLM.
_CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|tool_response>", "<|observation|>")
# How to write a message with a role that the template does not know. The policy must see that no person wrote it.
_KNOWN, _SHORT = 1024, 256  # texts whose tokens are kept, and characters of the longest of them
_PREFIXES = {"tool": "Tool result:\n", "system": "System:\n"}
T = TypeVar("T")


class TurnEncoder:
    r"""Makes the tokens of an episode's turns.

    Args:
        encoder: Renders and tokenizes prompts.
        stop_ids: Tokens that end a completion.
        tools: JSON schemas of the tools that the policy may call.
        tools_of: Returns the schemas of the tools for a prompt; None for all tools.
        turn_template: How to write a message after a plain-text prompt: text with `{content}` and, optionally, `{role}`;
            None for the default.

    Raises:
        ConfigError: If `turn_template` has other fields, or no `{content}`.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        stop_ids: Sequence[int],
        tools: Sequence[dict[str, Any]] = (),
        turn_template: str | None = None,
        tools_of: Callable[[Prompt], Sequence[dict[str, Any]]] | None = None,
    ) -> None:
        turn_template = TURN_TEMPLATE if turn_template is None else turn_template
        used = template_fields("model.turn_template", turn_template)
        if "content" not in used or set(used) - {"content", "role"}:
            raise ConfigError(
                f"model.turn_template={turn_template!r}: write {{content}} where the text of a message goes, {{role}} if wanted, "
                "and nothing else in braces"
            )
        self.tools = list(tools)
        self._tools_of = tools_of or (lambda prompt: self.tools)
        self._encoder = encoder
        self._given_stops = [int(token) for token in stop_ids]
        self._turn_template = turn_template
        self._trial = TemplateTrial(encoder, self.tools)
        self._sampled_ends: dict[str, int] = {}  # role of the first new message -> see `_sampled_end`
        # Episodes of a prompt often get the same short answers, and a tokenizer's call takes as long as one of a tool.
        self._known = lru_cache(_KNOWN)(encoder.tokenize)

    # ---- before the run

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a turn: the given ones, the template's own, and the tokens with which models end a tool call."""
        tokenizer = self._encoder.tokenizer
        vocabulary = tokenizer.get_vocab()
        found = {*self._given_stops, *(vocabulary[token] for token in _CALL_ENDS if token in vocabulary)}
        if self._encoder.has_template:
            closed, followed = self._trial.attempt([], False), self._trial.attempt([new_message("user")])
            pairs = zip(self._tokenize(closed or ""), self._tokenize(followed or ""), strict=False)
            end = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]  # the same whatever follows
            if not found.intersection(end):
                special = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
                found.update([token for token in end if token in special][:1])
        return sorted(found)

    def check(self, prompts: Iterable[Prompt], roles: Sequence[str]) -> None:
        """Before the run, test that messages of these roles can be added to its prompts.

        Raises:
            ConfigError: If the chat template renders earlier turns differently when messages follow, shows tools but not their
                results, or takes no texts.
            DataError: If the tokenizer cannot encode `turn_template`, or a row names tools that do not exist.
        """
        chat = set[bool]()
        for prompt in prompts:
            chat.add(prompt.messages is not None)
            self._tools_of(prompt)
        if False in chat:
            self._tokenize(self._write({"role": "", "content": ""}))
        if True in chat and self._encoder.has_template:  # without one the prompt itself is rejected
            self._encoder.check_contents()
            fitted = self._fit_after([new_message(role) for role in roles])
            change = self._trial.change([message["role"] for message in fitted]) if len(fitted) > 1 else ""
            if change:
                raise ConfigError(change)
            if self._trial.empty_thought:
                count = len(self._tokenize(self._trial.empty_thought))
                rank_zero_warn(
                    f"the chat template writes an empty thought ({count} tokens) before some answers without a thought, and "
                    "episodes keep answers as they were sampled: for each such answer a server with this template shows the "
                    f"trained model up to {count} tokens that training did not show; set model.chat_template={KEEP_HISTORY}, "
                    "which writes answers as they were sampled"
                )

    # ---- in the run

    def first(self, prompt: Prompt, added: Sequence[Message] = ()) -> tuple[list[int], list[Message]]:
        """Tokens before the first turn, and the conversation so far.

        System messages among the environment's first messages go to the front, where templates expect them.

        Raises:
            ConfigError: If the chat template rejects the messages.
            DataError: If the tokenizer cannot encode them.
        """
        asked: Sequence[Message] = prompt.messages or [{"role": "user", "content": prompt.text}]
        system = [message for message in added if message["role"] == "system"]
        others = [message for message in added if message["role"] != "system"]
        whole = [*system, *asked, *others]
        others = others if prompt.messages is None else self._fit(others)
        (system, others), mark = self._cut((system, others), asked)
        if prompt.messages is None:
            text = "".join([*map(self._write, system), prompt.text or "", *map(self._write, others)])
            return self._encoder.encode(replace(prompt, text=text), mark=mark), whole
        if added:
            begin = self._with_system(list(asked), "\n\n".join(str(message["content"]) for message in system))
            shown = self._joined([*begin, *others], fixed=len(begin) - 1)
            prompt = replace(prompt, messages=tuple(dict(message) for message in shown))
        return self._encoder.encode(prompt, self._tools_of(prompt), mark), whole

    def whole(self, messages: Sequence[Message], described: str = "") -> tuple[list[int], Prompt]:
        """Tokens of a conversation of other people's making up to the policy's opening, and its beginning as a prompt.

        No special token in it ends a turn. `described` is a system text in front, for a template that does not show tools.
        Without a chat template, the first user message is the prompt as it stands; the others follow by `turn_template`, and an
        answer of the policy as its own text and end.

        Raises:
            ConfigError: If the chat template rejects the messages.
            DataError: If the tokenizer cannot encode them.
        """
        if self._encoder.has_template:
            shown, mark = self._cut(self._with_system(list(messages), described))
            prompt = Prompt(messages=tuple(dict(message) for message in self._joined(shown)))
            return self._encoder.encode(prompt, self.tools, mark), prompt
        begin = list(takewhile(lambda message: message["role"] != "assistant", messages))
        place = next((n for n, message in enumerate(begin) if message["role"] == "user"), 0)
        text, mark = self._cut(str(begin[place]["content"]) if begin else "")
        prompt = Prompt(text=text)
        before, after = ([*begin[:place]], [*begin[place + 1 :]])
        ids = self._encoder.tokenize("".join(map(self._write, before)), add_special_tokens=True) if before else []
        ids += self._encoder.encode(prompt, mark=mark) if not before else self._tokenize(text, mark)
        ids += self.added(prompt, after, ()) if after else []
        for message in messages[len(begin) :]:
            if message["role"] == "assistant":
                text, mark = self._cut(str(message["content"]))
                ids += [*self._tokenize(text, mark), self._given_stops[0]]
            else:
                ids += self.added(prompt, [message], ())
        return ids, prompt

    def added(self, prompt: Prompt, new: Sequence[Message], sampled_ids: Sequence[int]) -> list[int]:
        """Tokens after a turn of the policy: the rest of the turn's end, the new messages and the next opening.

        If a stop token ended the policy's sample, the end of the turn is already there.

        Raises:
            ConfigError: If the chat template renders earlier turns differently when messages of such a role follow.
            DataError: If the template or the tokenizer rejects the messages.
        """
        new, mark = self._cut(new if prompt.messages is None else self._fit_after(new))
        if prompt.messages is None:
            return self._tokenize("".join(map(self._write, new)), mark)
        new = self._joined(new)
        try:
            ids = self._tokenize(self._trial.after_answer(new), mark)
        except REFUSED as error:
            raise DataError(
                f"the chat template rejects the environment's messages for {prompt.place}: {error}; correct the messages, or "
                "change model.chat_template"
            ) from error
        stopped, end = len(sampled_ids) > 0 and sampled_ids[-1] in self.stop_ids, self._sampled_end(new)
        if new and new[0]["role"] == "tool" and self._trial.after_calls and end:  # the rest of the call comes before its end
            return ids[end if sampled_ids[-1:] == [ids[end - 1]] else end - 1 :]
        return ids[end:] if stopped else ids

    def can_write(self, text: str) -> bool:
        """Whether the tokenizer can encode a text."""
        try:
            self._tokenize(text)
        except DataError:
            return False
        return True

    # ---- parts

    def _sampled_end(self, new: Sequence[Message]) -> int:
        """Number of tokens after an answer that are already there if a stop token ended it."""
        role = new[0]["role"] if new else ""
        if role not in self._sampled_ends:
            # The template's own token for ending turns counts, even if the policy sampled a different one. Tokens are counted,
            # not characters, since some tokenizers drop a line break after a special token.
            written = self._trial.after_answer([new_message(role)] if new else []).partition(NEW)[0]
            ids = self._tokenize(written)
            self._sampled_ends[role] = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), 0)
        return self._sampled_ends[role]

    def _fit(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the roles that the template can add; others become user messages that name their role."""
        fitted: list[Message] = []
        for message in messages:
            role = str(message["role"])
            if role != "user" and self._trial.fault(role):
                prefix = _PREFIXES.get(role, f"{role.capitalize()}:\n")
                message = {"role": "user", "content": f"{prefix}{message['content']}"}
            fitted.append(message)
        return fitted

    def _fit_after(self, messages: Sequence[Message]) -> list[Message]:
        """Messages after an answer, with the roles that the template can add; ConfigError if it cannot add any.

        Where the template shows tools, a result that it cannot add is not passed off as a message of the user.
        """
        fitted = self._fit(messages)
        if any(message["role"] == "tool" for message in messages) and self._trial.fault("tool") and self._trial.shows_tools:
            raise ConfigError(self._trial.fault("tool"))
        if any(message["role"] == "user" for message in fitted) and self._trial.fault("user"):
            raise ConfigError(self._trial.fault("user"))
        return fitted

    @cached_property
    def _alternates(self) -> bool:
        """Whether the template rejects two user messages in a row."""
        new = new_message("user")
        return self._trial.attempt([new, new]) is None

    def _joined(self, messages: Sequence[Message], fixed: int = 0) -> list[Message]:
        """Messages with successive user messages joined, if the template requires it; the first `fixed` stay unchanged."""
        joined = list(messages[:fixed])
        for message in messages[fixed:]:
            before = joined[-1] if len(joined) > fixed else None
            if before is not None and before["role"] == message["role"] == "user" and self._alternates:
                joined[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
            else:
                joined.append(message)
        return joined

    def _with_system(self, messages: list[Message], text: str) -> list[Message]:
        """Messages with a system text in front: after an existing system text, or before the user's without such a role."""
        if not text:
            return messages
        first = messages[0]
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
        system = {"role": "system", "content": text}
        try:
            if text.strip() in self._encoder.apply_template([system, *messages], self.tools):
                return [system, *messages]
        except REFUSED:
            pass
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]

    def _write(self, message: Message) -> str:
        values = {"role": message["role"], "content": message["content"]}
        return fill_template("model.turn_template", self._turn_template, values, "a message of the environment")

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokenizer = self._encoder.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        control = [str(entry.content) for token, entry in added if entry.special or token in self.stop_ids]
        # Matches the first character of each, even if one begins inside another; a single character cannot be split.
        return re.compile(f"(?=({'|'.join(re.escape(text) for text in control if len(text) > 1) or '(?!)'})).", re.DOTALL)

    def _cut(self, messages: T, around: Sequence[Message] = ()) -> tuple[T, str]:
        """Messages with a mark inside each control token of their texts, and the mark; "" if they have no control token."""
        if not any(map(self._control_tokens.search, _texts(messages))):
            return messages, ""
        used = set[str]().union(*_texts(messages), *_texts(around))
        mark = next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in used)  # private-use characters

        def cut(value: Any) -> Any:
            if isinstance(value, str):
                return self._control_tokens.sub(lambda found: found[0] + mark, value)
            if isinstance(value, dict):
                return {key: cut(item) for key, item in value.items()}
            return [cut(item) for item in value] if isinstance(value, (list, tuple)) else value

        return cut(messages), mark

    def _tokenize(self, text: str, mark: str = "") -> list[int]:
        try:
            return list((self._known if len(text) <= _SHORT else self._encoder.tokenize)(text, mark))
        except Exception as error:  # tokenizers without an "unknown" token raise no specific class
            begin = text.replace(mark, "")[:60]
            raise DataError(
                f"the tokenizer cannot encode an environment's message, which begins {begin!r}: {error}; a part of it is not in "
                "the model's vocabulary, so change the environment and model.turn_template (the embedded policy needs digits and "
                "signs, and model.turn_template='{content}'), or use another model"
            ) from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

"""`Tool`: something that a policy can call, with a description and checked arguments.

A tool is a Python function, or an object of class `Tool` if it keeps state between the calls of an episode. Its signature and
docstring become a JSON schema, which chat templates show to the policy.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Self, get_type_hints

from hybrid_lightning.environments.calls import Call, is_valid, parsed_json, schemas_of_arguments, typed_value, without_nullable
from hybrid_lightning.errors import ConfigError, one_line, shorten
from hybrid_lightning.shared.configurable import Configurable

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator  # slow to import


class Tool(Configurable, ABC):
    """Base class of tools that keep state between the calls of an episode. A subclass needs only `__call__`.

    The policy sees its docstring, with the arguments in Google's form, and its type hints.

    Example:
        >>> class Notebook(Tool):
        ...     def start(self, seed):
        ...         self.notes = []
        ...     def __call__(self, note: str) -> str:
        ...         '''Write something down.
        ...
        ...         Args:
        ...             note: What to write.
        ...         '''
        ...         self.notes.append(note)
        ...         return f"{len(self.notes)} notes"
        >>> Notebook().name
        'notebook'
    """

    @property
    def name(self) -> str:
        """Name by which the policy calls the tool; a subclass may override it."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the policy, with text or a value that can be written as JSON. It may be `async`."""

    def start(self, seed: int) -> None:
        """Begin an episode; the seed is that passed to `Environment.start`."""

    def close(self) -> None:
        """Free the episode's resources."""

    def new(self) -> Self:
        """An object for one episode, made with the same arguments."""
        return type(self)(**self._init_args)


class ToolSchema:
    """The JSON schema of a tool, for checking the arguments of its calls.

    Args:
        schema: `{"type": "function", "function": {"name", "description", "parameters"}}`.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema

    @cached_property
    def _validator(self) -> "Draft202012Validator":
        from jsonschema import Draft202012Validator

        return Draft202012Validator({**without_nullable(self.schema["function"]["parameters"]), "additionalProperties": False})

    def arguments(self, call: Call) -> tuple[dict[str, Any], str]:
        """The arguments of a call by name, and a description of the mistake in them, if any."""
        from jsonschema.exceptions import best_match

        known = self._validator.schema.get("properties", {})
        arguments, wrong = (dict(call.arguments), "") if call.text is None else self._of_text(call.text.strip())
        if wrong:
            return {}, wrong
        try:
            error = best_match(self._validator.iter_errors(arguments))
            if error is None:
                return arguments, ""
            place = f" {error.path[0]!r}" if error.path else "s"
            wrong = f"got wrong argument{place}: {error.message[:300]}"
        except RecursionError:  # in the text of an error
            wrong = "got wrong arguments: they are too deep"
        return {}, f"{wrong}; its arguments are {', '.join(known) or 'none'}"

    def _of_text(self, text: str) -> tuple[dict[str, Any], str]:
        """Arguments of a call with plain text. Text that begins like JSON must be JSON: it is never passed on by a guess."""
        known = schemas_of_arguments(self._validator.schema)
        needed = [name for name in self._validator.schema.get("required", []) if name in known]
        several = f"takes several arguments; give them as JSON: {', '.join(known)}" if len(known) > 1 else ""
        names = "|".join(map(re.escape, known)) or "(?!)"
        if re.match(rf"(?:```\w*\s*)?(?:\{{|[\"'](?:{names})[\"']\s*:)", text):
            value, first = parsed_json(text), next(iter(known), "")
            if not isinstance(value, dict):
                broken = f'got text that begins like JSON and is not; give text alone, or JSON such as {{"{first}": ...}}'
                return {}, several or (broken if known else "takes no arguments")
            by_name = set(needed) <= value.keys() <= known.keys()
            return {first: value} if len(known) == 1 and not by_name and is_valid(value, known[first]) else value, ""
        if not known and text:
            return {}, "takes no arguments"
        if len(needed) > 1 or (several and text.startswith("[")):
            return {}, several
        given = needed or list(known)[:1] if text else needed
        return {name: typed_value(text, known[name]) for name in given}, ""


def describe_tool(tool: Callable[..., Any]) -> tuple[str, ToolSchema]:
    """The name and the schema of a tool, from its signature and docstring.

    Raises:
        ConfigError: If the docstring, a type hint or an argument's description is missing, or if an argument cannot be given by
            name, such as `*args`.
    """
    if isinstance(tool, Tool):
        return tool.name, _schema(type(tool).__call__, tool.name, True)
    name = getattr(tool, "__name__", None)
    if isinstance(tool, type) or not callable(tool) or not isinstance(name, str):
        raise ConfigError(
            f"ToolEnvironment: the tool {shorten(tool)} is not a function; give a function or a hybrid_lightning Tool"
        )
    return name, _schema(getattr(tool, "__func__", tool), name, inspect.ismethod(tool))


@cache
def _schema(function: Callable[..., Any], name: str, bound: bool) -> ToolSchema:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
        odd = [entry for entry in parameters if entry.kind not in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
        if odd:
            raise TypeHintParsingException(f"{odd[0]} cannot be given by name")
        hints = get_type_hints(function)

        def described() -> None: ...

        described.__name__, described.__doc__ = name, _SECTION.sub("", inspect.getdoc(function) or "")
        described.__annotations__ = {entry.name: hints[entry.name] for entry in parameters if entry.name in hints}
        described.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        if hints.get("return") in _RETURNED:  # as in TRL's prompts; other return types have no JSON type
            described.__annotations__["return"] = hints["return"]
        return ToolSchema(dict(get_json_schema(described)))
    except (DocstringParsingException, TypeHintParsingException, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the tool {name} cannot be described to a policy: {one_line(error)}; write a docstring that explains what it does, "
            "describe every argument under `Args:`, and give every argument a type hint"
        ) from error


_RETURNED = (str, int, float, bool, list, dict)
# Docstring sections that the policy does not see.
_SECTION = re.compile(r"^(?:Examples?|Notes?|Yields|Raises|References):[ \t]*\n(?:[ \t]+.*(?:\n|\Z)|\n)*", re.MULTILINE)

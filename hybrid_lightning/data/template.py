r"""Templates such as `"{question}\nAnswer:"`, filled with the columns of a row.

Brackets select an entry of a column that holds a list or a dict, as in Python's `str.format`: `{choices[0]}`,
`{choices[text][0]}`. A whole list of options is written one per line, as `A. ...`.
"""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from hybrid_lightning.data.choice_options import lettered_options, options_of, parse_cell
from hybrid_lightning.data.tables import to_text
from hybrid_lightning.errors import ConfigError, DataError, shorten

_PLACEHOLDER = re.compile(r"(?P<column>[^\[\]]+)(?P<keys>(?:\[[^\[\]]+\])*)")


def template_fields(name: str, template: str) -> list[str]:
    """Names of the columns that a template uses; the template is the value of the parameter `name`.

    Raises:
        ConfigError: If the braces do not match, or a placeholder is more than a column or an entry of one.
    """
    try:
        pieces = [(field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(f"{name}={template!r}: {error}; write {{{{ and }}}} for literal braces") from error
    fields = []
    for field, spec, conversion in pieces:
        if field is None:
            continue
        match = _PLACEHOLDER.fullmatch(field)
        if match is None or spec or conversion:
            raise ConfigError(
                f"{name}={template!r}: a placeholder is the name of a column in braces and nothing else, such as {{question}}, "
                "or an entry of it, such as {choices[0]}; write {{ and }} for literal braces"
            )
        fields.append(match["column"])
    return fields


def fill_template(name: str, template: str, values: Mapping[str, Any], where: str) -> str:
    """Fill a template, the value of the parameter `name`, with the columns of a row, name -> value; `where` names the row.

    Raises:
        ConfigError: If the template uses a column that the row does not have.
        DataError: If a value that the template uses is missing or cannot be written as text.
    """
    text = []
    for literal, field, _, _ in Formatter().parse(template):
        text.append(literal)
        if field is None:
            continue
        match = _PLACEHOLDER.fullmatch(field)
        assert match is not None, "checked before"
        column = match["column"]
        if column not in values:
            raise ConfigError(
                f"{name}={template!r} uses {{{column}}}, which {where} does not have; it has {', '.join(sorted(values))} "
                "(write {{ and }} for literal braces)"
            )
        try:
            value = _entry(values[column], match["keys"])
            is_options = isinstance(value, (list, tuple, dict))  # options are written one per line
            text.append(lettered_options(options_of(value)[0]) if is_options else to_text(value))
        except ValueError as error:
            remedy = f"correct {name} or the row" if match["keys"] else "correct or remove the row"
            raise DataError(f"{where}: column {column!r}, which {name} uses, {error}; {remedy}") from error
    return "".join(text)


def _entry(value: Any, keys: str) -> Any:
    """The entry of a cell that brackets such as `[text][0]` select."""
    for key in re.findall(r"\[([^\[\]]+)\]", keys):
        value = parse_cell(value)
        if isinstance(value, dict):
            if key not in value:
                raise ValueError(f"has no entry [{key}]; it has {', '.join(f'[{known}]' for known in value) or 'none'}")
            value = value[key]
        elif isinstance(value, (list, tuple)):
            if not key.isdecimal() or int(key) >= len(value):
                raise ValueError(
                    f"has no entry [{key}]; it has [0] to [{len(value) - 1}]" if value else f"is empty, without an entry [{key}]"
                )
            value = value[int(key)]
        else:
            raise ValueError(f"is not a list, so it has no entry [{key}]: {shorten(value)}")
    return value

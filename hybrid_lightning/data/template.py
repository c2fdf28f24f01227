r"""Templates such as `"{question}\nAnswer:"`, filled with the columns of a row."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from hybrid_lightning.data.values import to_text
from hybrid_lightning.errors import ConfigError, DataError


def template_fields(name: str, template: str) -> list[str]:
    """Names of the columns that a template uses.

    Args:
        name: Of the parameter that holds the template, for error messages.
        template: Text with `{column}` placeholders; `{{` and `}}` stand for literal braces.

    Raises:
        ConfigError: If the braces do not match, or a placeholder is more than a column name.
    """
    try:
        pieces = [(field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(f"{name}={template!r}: {error}; write {{{{ and }}}} for braces that are no placeholder") from error
    fields = []
    for field, spec, conversion in pieces:
        if field is None:
            continue
        if not field or spec or conversion:
            raise ConfigError(
                f"{name}={template!r}: a placeholder is the name of a column in braces and nothing else, such as {{question}}; "
                "write {{ and }} for braces that are no placeholder"
            )
        fields.append(field)
    return fields


def render(name: str, template: str, values: Mapping[str, Any], where: str) -> str:
    """Fill a template.

    Args:
        name: Of the parameter that holds the template, for error messages.
        template: As in `template_fields`.
        values: Column name -> value.
        where: The row that the values come from, for error messages.

    Raises:
        ConfigError: If the template uses a column that the row does not have.
        DataError: If a value that it uses is missing or cannot be written as text.
    """
    text = []
    for literal, field, _, _ in Formatter().parse(template):
        text.append(literal)
        if field is None:
            continue
        if field not in values:
            raise ConfigError(
                f"{name}={template!r} uses {{{field}}}, which {where} does not have; it has {', '.join(sorted(values))} "
                "(write {{ and }} for braces that are no placeholder)"
            )
        try:
            text.append(to_text(values[field]))
        except ValueError as error:
            raise DataError(f"{where}: column {field!r}, which {name} uses, {error}; correct or remove the row") from error
    return "".join(text)

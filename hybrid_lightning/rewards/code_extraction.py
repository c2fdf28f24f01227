"""The program in a completion."""

import re

# Possessive quantifiers: a long line must not take time that grows with its square.
_BLOCK = re.compile(
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<language>[\w+.-]*+)[^\n]*+\n(?P<code>.*?)(?:^[ \t]*+(?P=fence)|\Z)", re.M | re.S
)
_PYTHON = {"python", "py", "python3"}


def extract_program(completion: str) -> str:
    r"""The last fenced block of Python, else the last fenced block, else the whole completion.

    A fence that is never closed ends with the completion: the sampler may stop at the closing one.

    Args:
        completion: The text.

    Example:
        >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
        'print(1)\n'
    """
    blocks = [(match["language"].lower(), match["code"]) for match in _BLOCK.finditer(completion)]
    python = [code for language, code in blocks if language in _PYTHON]
    return (python or [code for _, code in blocks] or [completion])[-1]

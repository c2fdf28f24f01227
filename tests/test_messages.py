"""Messages are "cause; remedy" on one line, which ends without a full stop: errors, warnings, and what is said on the screen."""

import ast

import pytest
from messages import WARNING, raised, warning_calls, warnings_of
from test_imports import FILES, ROOT

SAID = {*WARNING, "say"}


def ends(node, values):
    """The last pieces of text that a message may end with; nothing for what only a run knows.

    `values` has what is assigned to each name in the file.
    """
    if isinstance(node, ast.Constant):
        yield node.lineno, str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield from ends(node.values[-1], values) if node.values else ()
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from ends(node.right, values)
    elif isinstance(node, ast.IfExp):
        yield from (*ends(node.body, values), *ends(node.orelse, values))
    elif isinstance(node, ast.FormattedValue) and node.format_spec is None and not isinstance(node.value, ast.Name):
        yield from ends(node.value, values)
    elif isinstance(node, ast.Name):
        for value in values.get(node.id, []):
            yield from ends(value, {})


def with_full_stop(code):
    """Line of each message that ends with a full stop."""
    tree = ast.parse(code)
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    found = [end for message in (*raised(tree), *warning_calls(tree, SAID)) for end in ends(message, values)]
    return sorted({line for line, text in found if text.rstrip().endswith(".") and not text.rstrip().endswith("...")})


def test_no_message_ends_with_a_full_stop():
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line}"
        for path in FILES.values()
        for line in with_full_stop(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("raise ConfigError('a; '\n 'b.')", [1]),
        ("raise ConfigError('a' + (', b.' if c else ''))", [1]),
        ("message = f'{a}.'\nif b:\n    raise ConfigError(message)", [1]),
        ("warnings.warn('a.', stacklevel=2)", [1]),
        ("rank_zero_warn(f'a {b} c.')", [1]),
        ("say('a.')", [1]),
        ("raise ConfigError(f'a: {error}')", []),
        ("print('a.')", []),
    ],
)
def test_each_form_is_seen(code, lines):
    assert with_full_stop(code) == lines


def test_a_warning_of_ours_is_known_by_its_text():
    """So that conftest.py refuses one that a test does not expect, wherever it is said to come from."""
    known = warnings_of(list(FILES.values()))
    reached = "the hub h cannot be reached (r): only what is in the cache can be used"
    for text in ("two runs with one seed may differ: a", reached):
        assert any(pattern.fullmatch(text) for pattern in known)
    assert not any(pattern.fullmatch("`isinstance(treespec, LeafSpec)` is deprecated") for pattern in known)

"""What the source must not have: hidden channels between parts, and messages that end with a full stop.

A part is handed what it needs. A message is "cause; remedy" on one line, in errors, warnings and on the screen.
"""

import ast
import re

from messages import WARNING, raised, warning_calls, warnings_of
from test_imports import FILES, PACKAGE

# Ways by which something is handed on without being seen: switches of a process, entries in another's namespace, another's code,
# memos by identity.
CHANNEL = re.compile(
    r"^\s*global |\.__dict__\b|\.__class__ = |\bvars\(.*\)\[.*\] = |\.forward = |\bdel .*\.forward$|\bgetsource|\bFunctionType\b"
    r"|\bWeak(Key|Value)Dictionary\b|\.\w+\[id\(|\bid\(\w+\) (not )?in \w+\.|\.\w+(\[.*\])? [!=]= id\("
)
# The sandbox manages a program's names where the program runs. It numbers objects that go over a pipe, and keeps them as long as
# their numbers. A copy of a module has its parts.
ALLOWED = {"sandbox.candidate", "sandbox.harness", "sandbox.wire", "engine.fused_lora"}


def ends(node):
    """The last pieces of text that a message may end with; nothing for what only a run knows."""
    if isinstance(node, ast.Constant):
        yield node.lineno, str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield from ends(node.values[-1])
    elif isinstance(node, ast.BinOp):
        yield from ends(node.right)
    elif isinstance(node, ast.IfExp):
        yield from (*ends(node.body), *ends(node.orelse))


def full_stops(tree):
    """Line and end of each message that ends with a full stop."""
    for message in (*raised(tree), *warning_calls(tree, {*WARNING, "say"})):
        for line, text in ends(message):
            if text.rstrip().endswith(".") and not text.rstrip().endswith("..."):
                yield line, f"a full stop after {text[-30:]!r}"


def test_the_source_has_none_of_them():
    wrong = []
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        wrong += [f"{name}, line {line}: {what}" for line, what in full_stops(ast.parse(text))]
        if name.removeprefix(f"{PACKAGE}.") not in ALLOWED:
            wrong += [f"{name}, line {n}: {line}" for n, line in enumerate(text.splitlines(), 1) if CHANNEL.search(line)]
    assert not wrong, "\n".join(wrong)


CHANNELS = [
    *("    global on", "model.__dict__['pass'] = fast", "module.__class__ = Fused", "inspect.getsource(forward)"),
    *("memo = WeakKeyDictionary()", "self.memo[id(tokenizer)] = criteria", "if self.memo[0] != id(tokenizer):"),
    *("same = FunctionType(code, names)", "vars(module)['forward'] = fast", "module.forward = fast", "del module.forward"),
]
FULL_STOPS = [
    *("raise ConfigError('a; '\n 'b.')", "raise ConfigError('a' + (', b.' if c else ''))", "say('a.')"),
    *("raise ConfigError(f'{a}.')", "warnings.warn('a.', stacklevel=2)", "rank_zero_warn(f'a {b} c.')"),
]
NEITHER = [
    *("name = value.__class__.__name__", "id(x) in seen", "seen = {id(x)}", "vars(split)['train']"),
    *("raise ConfigError(f'a: {error}')", "print('a.')"),
]


def test_each_form_is_seen():
    assert all(CHANNEL.search(line) for line in CHANNELS) and all(list(full_stops(ast.parse(code))) for code in FULL_STOPS)
    assert not any(CHANNEL.search(code) or list(full_stops(ast.parse(code))) for code in NEITHER)


def test_no_two_classes_have_the_same_name():
    places: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_a_warning_of_ours_is_known_by_its_text():
    """So that conftest.py refuses one that a test does not expect, wherever it is said to come from."""
    known = warnings_of(list(FILES.values()))
    reached = "the hub h cannot be reached (r); using only the cache"
    for text in ("two runs with the same seed may differ: a", reached):
        assert any(pattern.fullmatch(text) for pattern in known)
    assert not any(pattern.fullmatch("`isinstance(treespec, LeafSpec)` is deprecated") for pattern in known)

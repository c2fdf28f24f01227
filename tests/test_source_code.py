"""What the source must not have: hidden channels between parts, and messages that end with a full stop.

A part is handed what it needs. A message is "cause; remedy" on one line, in errors, warnings and on the screen.
"""

import ast

from messages import WARNING, raised, warning_calls, warnings_of
from test_imports import FILES, PACKAGE

# A program's names are looked after where it runs, and a copy of a module has its parts.
OWN_NAMESPACES = {"sandbox.candidate", "sandbox.harness", "sandbox.wire", "engine.fused_lora"}
# What is sent over a pipe is numbered, and kept as long as its numbers.
OWN_IDS = {"sandbox.candidate", "sandbox.wire"}


def channels(tree):
    """Line and kind of each way by which something is handed on without being seen."""
    for node in ast.walk(tree):
        name, stored = getattr(node, "attr", getattr(node, "id", "")), not isinstance(getattr(node, "ctx", None), ast.Load)
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        elif isinstance(node, ast.Attribute) and (
            name in ("__dict__", "getsource", "getsourcelines") or (name == "__class__" and stored)
        ):
            yield node.lineno, name
        elif isinstance(node, ast.Name) and name in ("WeakKeyDictionary", "WeakValueDictionary"):
            yield node.lineno, f"a memo by identity, {name}"
        elif isinstance(node, (ast.Subscript, ast.Compare)) and remembers_by_identity(node):
            yield node.lineno, "a memo by identity, id()"
        elif name == "FunctionType":
            yield node.lineno, "a function made of another's code, FunctionType"
        elif isinstance(node, ast.Subscript) and stored and is_call_of(node.value, "vars"):
            yield node.lineno, "a change of vars()"
        elif isinstance(node, ast.Attribute) and name == "forward" and stored:
            yield node.lineno, "a forward pass put into a module or taken out of it"


def is_call_of(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def remembers_by_identity(node):
    """Whether an attribute, which outlives the call, is looked into for an id; a local set of ids is no memo."""
    parts = [node.value, node.slice] if isinstance(node, ast.Subscript) else [node.left, *node.comparators]
    ids = [part for part in parts if is_call_of(part, "id")]
    kept = [part for part in parts if part not in ids and any(isinstance(inner, ast.Attribute) for inner in ast.walk(part))]
    return bool(ids and kept)


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


def full_stops(tree):
    """Line and end of each message that ends with a full stop."""
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    for message in (*raised(tree), *warning_calls(tree, {*WARNING, "say"})):
        for line, text in ends(message, values):
            if text.rstrip().endswith(".") and not text.rstrip().endswith("..."):
                yield line, f"a full stop behind {text[-30:]!r}"


def allowed(name, fault):
    own = name.removeprefix(f"{PACKAGE}.")
    return (fault == "__dict__" and own in OWN_NAMESPACES) or ("id()" in fault and own in OWN_IDS)


def test_the_source_has_none_of_them():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    found = [(name, line, what) for name, tree in trees.items() for line, what in (*channels(tree), *full_stops(tree))]
    wrong = [f"{name}, line {line}: {what}" for name, line, what in found if not allowed(name, what)]
    assert not wrong, "\n".join(wrong)


CHANNELS = [
    *("def f():\n    global on\n    on = True", "model.__dict__['pass'] = fast", "module.__class__ = Fused"),
    *("inspect.getsource(forward)", "memo = WeakKeyDictionary()", "self.memo[id(tokenizer)] = criteria"),
    *("self.memo[0] != id(tokenizer)", "same = FunctionType(code, names)", "vars(module)['forward'] = fast"),
    *("module.forward = fast", "del module.forward"),
]
FULL_STOPS = [
    *("raise ConfigError('a; '\n 'b.')", "raise ConfigError('a' + (', b.' if c else ''))", "say('a.')"),
    *("message = f'{a}.'\nif b:\n    raise ConfigError(message)", "warnings.warn('a.', stacklevel=2)"),
    "rank_zero_warn(f'a {b} c.')",
]
NEITHER = [
    *("name = value.__class__.__name__", "seen = {id(x)}\nid(x) in seen", "vars(split)['train']"),
    *("raise ConfigError(f'a: {error}')", "print('a.')"),
]


def test_each_form_is_seen():
    for codes, counts in ((CHANNELS, (1, 0)), (FULL_STOPS, (0, 1)), (NEITHER, (0, 0))):
        for tree in map(ast.parse, codes):
            assert (len(set(channels(tree))), len(set(full_stops(tree)))) == counts, ast.unparse(tree)


def test_a_warning_of_ours_is_known_by_its_text():
    """So that conftest.py refuses one that a test does not expect, wherever it is said to come from."""
    known = warnings_of(list(FILES.values()))
    reached = "the hub h cannot be reached (r): only what is in the cache can be used"
    for text in ("two runs with one seed may differ: a", reached):
        assert any(pattern.fullmatch(text) for pattern in known)
    assert not any(pattern.fullmatch("`isinstance(treespec, LeafSpec)` is deprecated") for pattern in known)

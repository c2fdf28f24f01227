"""What a part needs is handed to it: no hidden channels between parts of the package."""

import ast

import pytest
from test_imports import FILES, PACKAGE

# A program's names are looked after where it runs, and a copy of a module has its parts.
OWN_NAMESPACES = {"sandbox.candidate", "sandbox.harness", "sandbox.wire", "engine.fused_lora"}
# What is sent over a pipe is numbered, and kept as long as its numbers.
OWN_IDS = {"sandbox.candidate", "sandbox.wire"}


def faults(tree):
    """Line and kind of each way by which something is handed on without being seen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            yield node.lineno, "__dict__"
        elif isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store):
            yield node.lineno, "an assignment to __class__"
        elif isinstance(node, ast.Attribute) and node.attr in ("getsource", "getsourcelines"):
            yield node.lineno, f"inspect.{node.attr}"
        elif isinstance(node, ast.Name) and node.id in ("WeakKeyDictionary", "WeakValueDictionary"):
            yield node.lineno, f"a memo by identity, {node.id}"
        elif isinstance(node, (ast.Subscript, ast.Compare)) and remembers_by_identity(node):
            yield node.lineno, "a memo by identity, id()"
        elif "FunctionType" in (getattr(node, "id", ""), getattr(node, "attr", "")):
            yield node.lineno, "a function made of another's code, FunctionType"
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and is_call_of(node.value, "vars"):
            yield node.lineno, "a change of vars()"
        elif isinstance(node, (ast.Assign, ast.Delete)) and any(
            isinstance(target, ast.Attribute) and target.attr == "forward" for target in node.targets
        ):
            yield node.lineno, "a forward pass put into a module or taken out of it"


def is_call_of(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def remembers_by_identity(node):
    """Whether an attribute, which outlives the call, is looked into for an id; a local set of ids is no memo."""
    parts = [node.value, node.slice] if isinstance(node, ast.Subscript) else [node.left, *node.comparators]
    ids = [part for part in parts if is_call_of(part, "id")]
    kept = [part for part in parts if part not in ids and any(isinstance(inner, ast.Attribute) for inner in ast.walk(part))]
    return bool(ids and kept)


def allowed(name, fault):
    own = name.removeprefix(f"{PACKAGE}.")
    return ("__dict__" in fault and own in OWN_NAMESPACES) or ("id()" in fault and own in OWN_IDS)


def test_nothing_is_handed_on_without_being_seen():
    found = [
        f"{name}, line {line}: {what}"
        for name, path in FILES.items()
        for line, what in faults(ast.parse(path.read_text(encoding="utf-8")))
        if not allowed(name, what)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    global on\n    on = True",
        "model.__dict__['pass'] = fast",
        "module.__class__ = Fused",
        "inspect.getsource(forward)",
        "memo = WeakKeyDictionary()",
        "self.memo[id(tokenizer)] = criteria",
        "self.memo[0] != id(tokenizer)",
        "same = FunctionType(code, names)",
        "vars(module)['forward'] = fast",
        "module.forward = fast",
        "del module.forward",
    ],
)
def test_each_kind_is_found(code):
    assert len(list(faults(ast.parse(code)))) == 1


@pytest.mark.parametrize("code", ["name = value.__class__.__name__", "seen = {id(x)}\nid(x) in seen", "vars(split)['train']"])
def test_reading_and_what_ends_with_the_call_are_no_faults(code):
    assert not list(faults(ast.parse(code)))

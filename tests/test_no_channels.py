"""What a part needs is handed to it: no hidden channels between parts of the package."""

import ast

import pytest
from test_imports import FILES, PACKAGE

# A program's names are looked after where it runs, and a copy of a module has its parts.
OWN_NAMESPACES = {"sandbox.candidate", "sandbox.harness", "sandbox.plain_objects", "engine.fused_lora"}


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


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_handed_on_without_being_seen(name):
    found = [f"line {line}: {what}" for line, what in faults(ast.parse(FILES[name].read_text(encoding="utf-8")))]
    if name.removeprefix(f"{PACKAGE}.") in OWN_NAMESPACES:
        found = [fault for fault in found if "__dict__" not in fault]
    assert not found, f"{name}: {'; '.join(found)}"


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    global on\n    on = True",
        "model.__dict__['pass'] = fast",
        "module.__class__ = Fused",
        "inspect.getsource(forward)",
        "memo = WeakKeyDictionary()",
    ],
)
def test_each_kind_is_found(code):
    assert len(list(faults(ast.parse(code)))) == 1


def test_reading_a_class_is_no_fault():
    assert not list(faults(ast.parse("name = value.__class__.__name__")))

"""What the source must not have: hidden channels between parts, parts that configure others, messages that end with a full stop.

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
ALLOWED = {"sandbox.candidate", "sandbox.harness", "sandbox.wire", "runner.fused_lora"}


MAKES = re.compile(r"(.*\.)?([A-Z]\w*|cls|type\(self\)|copy|deepcopy|clone|new|__new__)")
# Attributes that other libraries' objects have too: weights and modules of torch, Lightning's Trainer, PEFT's configs, streams.
OF_LIBRARIES = {"data", "weight", "training", "description", "target_modules", "rank_pattern", "config", "revision"}
OF_LIBRARIES |= {"stdin", "stdout", "stderr", "_experiment"}
# File -> what it may assign to objects that it has been given.
GIVEN = {
    "callbacks.diagnosis": "pl_module.task.last_calibration",  # taken out, so that its completions are not kept
    "callbacks.graceful_stop": "pl_module.run.signals exception.explained",  # a run is stopped by this callback
    "callbacks.step_timer": "pl_module.run.clock",  # and timed by this one
    "runner.prepacked": "layer.prepacked",  # for the time of a context, in layers of the runner
    "model.policy": "backend.why_float32",  # the model decides about its precision, and the runner reports it
    "rollout.sampler": "decoding.graphs",  # set once, before the first token
}


def declared(tree):
    """Names of all attributes of a file's classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def made_by(function):
    """Names of the objects that a function makes: of what a class or a copy returns."""
    for node in ast.walk(function):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            for one, value in zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]:
                if isinstance(value, ast.Call) and MAKES.fullmatch(ast.unparse(value.func)):
                    names = (part for part in ast.walk(one) if isinstance(part, ast.Name))
                    yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


def configured(tree, attributes):
    """Assignments to attributes of our classes, and private ones read by name, in objects that the code has been given.

    A function may set what it has made itself, an object may set its own private parts, and a file its own records.
    """
    own = set(declared(tree))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        made = set(made_by(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                local = owner in {"self", "cls", "ctx", *made} or (owner.isidentifier() and node.attr in own)
                if node.attr in attributes and not local and not re.fullmatch(r"self\._\w+", owner):
                    yield ast.unparse(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
                name = getattr(node.args[-1 if len(node.args) == 1 else 1], "value", "")
                if str(name).startswith("_") and name in attributes:
                    yield ast.unparse(node)


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


def test_no_part_configures_another_that_it_was_given():
    trees = {name.removeprefix(f"{PACKAGE}."): ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    attributes = {name for tree in trees.values() for name in declared(tree)} - OF_LIBRARIES
    found = {name: set(configured(tree, attributes)) for name, tree in trees.items()}
    assert {name: names for name, names in found.items() if names} == {name: set(text.split()) for name, text in GIVEN.items()}


CONFIGURED = [
    *("adapter.planning = 1", "self.adapter.planning = 1", "sampler.version, x = 1, 2", "del adapter.planning"),
    *("getattr(data, '_limits', {})", "for adapter.planning in x: pass", "adapter.planning += 1"),
]
NOT_CONFIGURED = [
    *("self.planning = 1", "self._adapter.planning = 1", "adapter = Adapter()\n adapter.planning = 1", "model.unknown = 1"),
    *("getattr(data, 'limits')", "adapter.planning.append(1)", "getattr(config, '_of_a_library', None)"),
]


def test_each_form_of_configuring_others_is_seen():
    attributes = {"planning", "version", "_limits"}
    seen = {code: list(configured(ast.parse(f"def f(self):\n {code}"), attributes)) for code in CONFIGURED + NOT_CONFIGURED}
    assert [code for code, names in seen.items() if names] == CONFIGURED


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

"""Help of the command line: options and docstrings of the classes that a command's config names, and of any other class.

    --help  ->  config (all other arguments)  ->  sections (one per class)  ->  text

`cli_parser.py` reads arguments and reports mistakes in them.
"""

import argparse
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from hybrid_lightning.cli.parser import Parser, is_ours, known_classes, suggestion, type_of
from hybrid_lightning.cli.switches import is_of_a_library
from hybrid_lightning.errors import ConfigError

_HOW = """\
Start from a config, and change any of its values by an option, as in

    {command} --config gspo --model.lr_lora=1e-3

In a config that option is model: {{lr_lora: 1e-3}}; for None write null. A later --config overrides an earlier one, and options
override all configs.

Options come in groups, one for each class that the config names:

    model        the policy and how it learns: loss, reward, sampler, rates
    data         the problems: source, format, number of validation problems
    adapter      which modules train fully, which by LoRA, which stay frozen
    checkpoint   which checkpoints are kept
    samples      which completions are logged
    divergence   when a warning of reward hacking is printed
    predictions  the file that `predict` writes
    trainer      steps, devices, precision, loggers: Lightning's Trainer

To use other classes and to read more:

    --KEY=CLASS         takes another class, as in --model.loss=GRPOLoss
    --KEY.help          shows the class and lists the others, as in --data.help
    --KEY.help=CLASS    shows another one: --model.reward.help=FunctionReward

Below, an option shows its type, its default and, after "now", the value of the config."""


# Options that libraries add to every command.
_SHARED = {
    "config": "Config file, or the name of a shipped config (see the command `configs`). Later ones override earlier ones.",
    "print_config": "Print the resulting config and exit; --print_config=skip_default leaves out defaults.",
    "seed_everything": "Seed of Python, NumPy and torch; true draws a random one.",
    "ckpt_path": "Checkpoint to load: a file, or the folder of a sharded checkpoint.",
    "weights_only": "Whether to load only tensors and plain types from the checkpoint.",
}


def help_asked_last(arguments: Sequence[str]) -> list[str]:
    """Move a request for help to the end, as a single `--help=KEY=CLASS`, so that the config is known when it is handled.

    Example:
        >>> help_asked_last(["fit", "--model.loss.help", "GRPOLoss", "--config", "a.yaml"])
        ['fit', '--config', 'a.yaml', '--help=model.loss=GRPOLoss']
    """
    asked, others, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        match = re.fullmatch(r"--([\w.]+)\.help(=.*)?", argument)
        if argument in ("-h", "--help"):
            asked.append("")
        elif match is None:
            others.append(argument)
        elif match[2] is None and waiting and not waiting[0].startswith("-"):
            asked.append(f"{match[1]}={waiting.pop(0)}")
        else:
            asked.append(match[1] + (match[2] or ""))
    return [*others, *(f"--help={key}" for key in asked[:1])]


class ShowHelp(argparse.Action):
    """Prints the help for all options, or for `KEY` or `KEY=CLASS`."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, help="Show this help.")

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the help and exit. `namespace` has the values of the arguments before this one and of their configs."""
        try:
            config = namespace.as_dict()
            text = _help_on(parser, config, values) if values else _overview(parser, config)
        except ConfigError as error:
            parser.error(str(error))
        with suppress(BrokenPipeError):  # the reader may stop reading, as `head` does
            print(text, flush=True)
        parser.exit()


@dataclass(frozen=True)
class Section:
    """A class that a config names."""

    key: str  # such as model.loss
    part: type
    values: Mapping[str, Any]  # argument -> value in the config
    kind: Any = None  # type of the option that accepts the class

    def options(self) -> list[argparse.Action]:
        """One option for each argument of the class, by its full name."""
        return self.add_to(ArgumentParser(), "")

    def add_to(self, parser: ArgumentParser, title: str, description: str = "", base: Any = None) -> list[argparse.Action]:
        """Add the options to a parser as a group. With a `base`, the group begins with the option that chooses the class."""
        group = parser.add_argument_group(title, description)
        if base is not None:
            group.add_argument(f"--{self.key}", type=base, help="The class.")
        called_with = get_args(self.kind)[0] if get_origin(self.kind) is Callable else ()  # such as parameters for an optimizer
        skip: set[str | int] = {len(called_with)} if called_with else set()
        names = group.add_class_arguments(self.part, self.key, as_group=False, fail_untyped=False, skip=skip)
        actions = [action for action in parser._actions if action.dest in names]
        for action in actions:
            action.help = _whole(action.help or "", self.part, action.dest.rpartition(".")[2])
        return actions


def sections(parser: Parser, config: Mapping[str, Any]) -> list[Section]:
    """A section for each class that a command's config names. Nested classes follow their outer class; the Trainer comes last."""
    found: list[Section] = []
    for key in sorted(parser.parts, key=lambda key: key == "trainer"):
        value = config.get(key)
        found += _of_spec(key, value) if _is_spec(value) else _and_inner(Section(key, parser.parts[key], value or {}))
    return found


def _of_spec(key: str, spec: Any, kind: Any = None) -> Iterator[Section]:
    part = _imported(spec["class_path"])
    if isinstance(part, type):
        yield from _and_inner(Section(key, part, spec.get("init_args") or {}, kind))


def _and_inner(section: Section) -> Iterator[Section]:
    yield section
    for action in section.options():
        for key, spec in _specs(action.dest, section.values.get(action.dest.rpartition(".")[2])):
            yield from _of_spec(key, spec, type_of(action))


def _specs(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if _is_spec(value):
        yield key, value
    elif isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"{key}[{name}]", item) for name, item in items if _is_spec(item))


def _overview(parser: Parser, config: Mapping[str, Any]) -> str:
    found = sections(parser, config)
    shown = _new_parser(parser, config, f"{parser.description}\n\n{_HOW.format(command=parser.command)}")
    own = shown.add_argument_group(parser.command.rpartition(" ")[2])
    for action in parser._actions:  # the command's own options
        if "." not in action.dest and action.dest not in parser.parts and not isinstance(action, ShowHelp):
            shortened = first_sentence(action.help) if "``" in (action.help or "") else action.help  # Lightning's
            action.help = _SHARED.get(action.dest, shortened)
            own._add_action(action)
    for section in found:
        base = parser.parts.get(section.key)
        named = section.part is not base
        title = f"{section.key} ({section.part.__name__})" if named else section.key
        actions = section.add_to(shown, title, _paragraphs(section.part)[0], base if named else None)
        if is_of_a_library(section.part):  # libraries have pages of their own
            for action in actions:
                action.help = first_sentence(action.help)
    return shown.format_help()


def _help_on(parser: Parser, config: Mapping[str, Any], asked: str) -> str:
    key, _, name = asked.replace(".init_args.", ".").partition("=")
    found = {section.key: section for section in sections(parser, config)}
    kinds = {action.dest: type_of(action) for section in found.values() for action in section.options()}
    kinds |= {key: base for key, base in parser.parts.items() if found[key].part is not base}
    section, known = found.get(key), known_classes(kinds.get(key))
    if section is None and not known:
        others = [*found, *(name for name, kind in kinds.items() if known_classes(kind))]
        near = suggestion(key, others, "--{}.help") or f"; {parser.command} --help lists all options"
        raise ConfigError(f"--{key}.help: there is no class {key}{near}")
    if name:
        named = _named(key, name, known, kinds.get(key))
        section = section if section is not None and section.part is named.part else named
    shown = _new_parser(parser, config if section is found.get(key) else {})
    if section is not None:
        title = f"--{key}={section.part.__name__}" if known else f"--{key}.OPTION"
        required = [action.dest.rpartition(".")[2] for action in section.add_to(shown, "options") if action.required]
        shown.description = "\n\n".join([title, *_paragraphs(section.part), *(_in_a_config(section, required) if known else [])])
    if known:
        title = "" if section is not None else f"no class is chosen for --{key}; "
        lines = [f"    {name}: {first_sentence(_paragraphs(part)[0])}" for name, part in known.items()]
        shown.add_argument_group(f"{title}classes for --{key} (your own: module.Class)", "\n".join(lines))
    return shown.format_help()


def _named(key: str, name: str, known: Mapping[str, type], kind: Any) -> Section:
    part = known.get(name) or _imported(name)
    if not isinstance(part, type):
        near = suggestion(name, known, f"--{key}.help={{}}") or f"; give one of {', '.join(known)}, or module.Class"
        raise ConfigError(f"--{key}.help={name}: unknown class {name}{near}")
    return Section(key, part, {}, kind)


def _in_a_config(section: Section, required: list[str]) -> list[str]:
    part = section.part
    spec: dict[str, Any] = {"class_path": part.__name__ if is_ours(part) else f"{part.__module__}.{part.__qualname__}"}
    if required:
        spec["init_args"] = dict.fromkeys(required, "...")
    for name in reversed(section.key.split(".")):
        spec = {name: spec}
    return ["In a config:", textwrap.indent(yaml.safe_dump(spec, sort_keys=False), "    ")]


def _new_parser(parser: Parser, config: Mapping[str, Any], description: str = "") -> ArgumentParser:
    class WithValues(_Text):
        given, expected = (dict(_values(parser.parts, values)) for values in (config, parser.get_defaults().as_dict()))

    usage = f"{parser.command} [--config FILE ...] [--OPTION=VALUE ...]"
    return ArgumentParser(usage=usage, description=description, formatter_class=WithValues, add_help=False)


def _values(keys: Iterable[str], values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Option -> value for every value in a config, as pairs."""
    for key in keys:
        value = values.get(key)
        yield above + key, value
        if not above and not _is_spec(value):  # options of a fixed class
            yield from _values(value or {}, value or {}, f"{key}.")
            continue
        for name, spec in _specs(above + key, value):
            yield from _values(inner := spec.get("init_args") or {}, inner, f"{name}.")


class _Text(DefaultHelpFormatter):
    """Formats each option on its own line with its meaning below. Fills paragraphs; examples keep their lines."""

    given: Mapping[str, Any]
    expected: Mapping[str, Any]

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def add_arguments(self, actions: Any) -> None:
        super().add_arguments([action for action in actions if not action.option_strings[-1].endswith(".help")])

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        return ", ".join(name.removeprefix("--") if "[" in name else name for name in names)

    def _get_help_string(self, action: argparse.Action) -> str:
        known = _choices(type_of(action))
        facts = ["required"] if action.required else []
        facts.append("one of " + ", ".join(known) if known else "%(type)s" if type_of(action) is not None else "")
        default = self.expected.get(action.dest, action.default)
        if default != argparse.SUPPRESS and not action.required:
            facts.append(f"default: {_shown(default)}")
        if action.dest in self.given and _shown(self.given[action.dest]) != _shown(default):
            facts.append(f"now: {_shown(self.given[action.dest])}")
        facts = [fact for fact in facts if fact]
        return f"{action.help} ({'; '.join(facts)})" if facts else action.help or ""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = []
        for block in re.split(r"\n\s*\n", text):
            lines = block.splitlines()
            example = any(line.startswith((" ", ">>>")) for line in lines)
            filled = lines if example else textwrap.wrap(" ".join(lines), width - len(indent), break_on_hyphens=False)
            blocks.append("\n".join(indent + line for line in filled))
        return "\n\n".join(blocks)


def _choices(kind: Any) -> dict[str, type]:
    """Classes that an option accepts, if it accepts only classes or null."""
    alternatives = [kind] if get_origin(kind) is Callable else [part for part in get_args(kind) if part is not NoneType] or [kind]
    return known_classes(alternatives[0]) if len(alternatives) == 1 else {}


def _paragraphs(part: type) -> list[str]:
    """The paragraphs of a class's docstring, without the sections on arguments and errors."""
    paragraphs, kept = [], True
    for block in re.split(r"\n\s*\n", inspect.getdoc(part) or ""):
        if block.startswith(".. "):  # directives of Sphinx, such as the formulas in torch's docstrings
            break
        if re.match(r"\w+:\n", block):
            kept = not block.startswith(("Args:", "Raises:"))
        if kept:
            paragraphs.append(block)
    first = " ".join(paragraphs[0].splitlines()) if paragraphs else ""
    return [re.sub(r"``?(.*?)``?", r"`\1`", re.sub(r":\w+:`~?(.*?)`", r"`\1`", first)), *paragraphs[1:]]


def _whole(text: str, part: type, name: str) -> str:
    """The description of an argument; a base class's description if it is missing or begins with `As in Base`."""
    match = re.match(r"(?:As in|See) `(\w+)`", text)
    bases = part.__mro__[1:] if match is None else [base for base in part.__mro__ if base.__name__ == match[1]]
    if (text and match is None) or not bases:
        return text or "Not described."
    params = (param for base in bases for param in parse(base.__doc__ or "").params)
    said = next((param.description for param in params if param.arg_name == name), None) or ""
    rest = text[match.end() :] if match else "."
    return _whole(said if rest == "." else said.rstrip(".") + rest, bases[0] if match else object, name)


def first_sentence(text: str | None) -> str:
    """The first sentence of a text, on one line; sentences that begin with "Default" are skipped."""
    text = " ".join((text or "").replace("``", "`").split())
    sentences = re.split(r"(?<=\.)\s(?=[A-Z])", text)
    return next((sentence for sentence in sentences if not sentence.startswith("Default")), text)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str)


def _shown(value: Any) -> str:
    """A value as it would be in a config; a class by its name."""
    if _is_spec(value):
        return str(value["class_path"].rpartition(".")[2])
    if isinstance(value, (list, tuple)) and any(_is_spec(item) for item in value):
        return f"[{', '.join(map(_shown, value))}]"
    return value if isinstance(value, str) and value.strip() else json.dumps(value, default=str)

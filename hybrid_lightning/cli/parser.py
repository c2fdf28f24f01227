"""The parser of the command line: reads values, and reports a mistake in arguments or configs in one line.

It rewords jsonargparse's messages, and adds the file or option of the mistake and the name that was probably meant. `remedies.py`
rewords mistakes that are found later, when a run is set up.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from types import GenericAlias
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hybrid_lightning.cli.remedies import broken_config, config_paths, is_machine_error, of_trl, with_remedy
from hybrid_lightning.cli.switches import Switched, switched_options
from hybrid_lightning.errors import HybridLightningError, shorten
from hybrid_lightning.shared.configurable import constructor_defaults, imported_class, public_path
from hybrid_lightning.shared.user_code import import_problem

# Messages of jsonargparse that name no remedy -> replacement; above them, text to remove in front of the reason.
_REWRITES = (
    (r"Does not validate against any of the Union subtypes\s+Subtypes: \[.*?\]\s+Errors:\s+- ", ""),
    (r"-\s+Expected a path but \S+ either not accessible or invalid\s+(?:- )?", ""),
    (
        r'expected "subcommand" to be one of .*',
        "no command was given; give one, such as python -m hybrid_lightning fit --config gspo (--help lists all)",
    ),
    (
        r"Parser key \"config\": File does not exist: '(.+)'",
        r"--config \1: there is no such file; correct the path, or give one of the names that the command 'configs' lists",
    ),
    (
        r"Option \S+ is not accepted before subcommand '(\w+)'",
        r"--config comes after the command; give python -m hybrid_lightning \1 --config FILE",
    ),
    (
        r"the following arguments are required: (loss)$",
        r"model.\1 is missing; give a config, such as --config gspo (the command 'configs' lists all) or your own file",
    ),
    (
        r"(?:Import path (?:\S+ )?does not correspond to a subclass of RewardFunction|Unexpected import path format: \S+\.py:\w+)"
        r".*Given value: (\S+)",
        r"\1 is not a class derived from RewardFunction; for a function give class_path FunctionReward with function: \1",
    ),
)


_load_yaml = jsonargparse.get_loader("yaml")


def _load_value(text: str) -> Any:
    """Read YAML.

    Two texts need care, because jsonargparse reads the strings of a config as YAML a second time. `answer_pattern:
    '####\\s*(.+)'` would become null, since YAML reads it as a comment. And a null for an argument of a nested class arrives
    here as Python's None: `--data.format.system_prompt=null` would put the word None in front of every prompt.
    """
    value = _load_yaml(text)
    if text == "None":
        return None
    return text if value is None and text.lstrip().startswith("#") else value


_MODE = "hybrid_lightning"  # for our parsers only: others in this process read YAML as jsonargparse does


class Refusal(SystemExit):
    """Raised by a class's parser for an option that the class does not have, or with a value that does not fit (`misfit`).

    The command's parser adds where the option was given.

    It is a `SystemExit`, because after an ordinary error jsonargparse would try the option's other types, and report all of them.
    """

    def __init__(self, part: type, name: str, names: list[str], misfit: str = "") -> None:
        super().__init__(f"error: {part.__name__}: {name}: {misfit or 'there is no such option'}")
        self.part, self.name, self.names, self.misfit = part, name, names, misfit


def _unchecked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `dump` and `save` that switch off checks; Lightning still uses the former name of one."""
    return {"skip_unset" if name == "skip_none" else name: value for name, value in options.items()} | {"skip_validation": True}


class Parser(LightningArgumentParser):
    """Refuses abbreviated options, and reports every error in one line.

    Attributes:
        parts: Key -> class that defines its options; for `model` and `data` a base class of the classes that can be named.
        switched: Options of classes that another class replaced while arguments were read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        jsonargparse.set_loader(_MODE, _load_value, exceptions=(yaml.YAMLError,))
        # With abbreviations --trainer.max_epoch=3 would silently be read as max_epochs.
        super().__init__(*args, **{"allow_abbrev": False, "parser_mode": _MODE, **kwargs})
        self.parts: dict[str, type] = {}
        self.switched: list[Switched] = []
        self.part: type | None = None  # the class, if this parses the arguments of one class only

    @property
    def command(self) -> str:
        """The command as typed, such as `python -m hybrid_lightning fit`."""
        return self.prog.replace(" [options]", "")

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a class, and record it."""
        self.parts[nested_key] = lightning_class
        return super().add_lightning_class_args(lightning_class, nested_key, *args, **kwargs)

    def add_class_arguments(self, class_type: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a class. Without a key, this is the parser that jsonargparse makes for a class named in a config."""
        if nested_key is None:
            self.part = class_type
        return super().add_class_arguments(class_type, nested_key, *args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse arguments; the error for an unknown option of a class names where it was given."""
        try:
            with switched_options() as self.switched:
                return super().parse_args(*args, **kwargs)
        except Refusal as refusal:
            if not self.exit_on_error:
                raise
            self.error(self._placed(refusal))

    def dump(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        """Convert a config to text, with the public paths of our classes in place of jsonargparse's shortest ones.

        Parsing has already checked the config; jsonargparse would check all of its parts once more.
        """
        text = super().dump(*args, **_unchecked(kwargs))
        return re.sub(r"(?<=class_path: )hybrid_lightning\.[\w.]+", lambda found: _public(found[0]), text)

    def save(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a config, as `dump`."""
        super().save(*args, **_unchecked(kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake in one line and exit with 2."""
        refused = re.fullmatch(r"Option '(\S+)' is not accepted", message)
        if refused and self.part is not None and not self.exit_on_error:
            raise Refusal(self.part, refused[1], [action.dest for action in self._actions if action.dest != "help"])
        mistake = self._unimportable(message) or self._unknown_class(message) or self._misfit(message)
        if mistake and self.part is not None and not self.exit_on_error:
            raise Refusal(self.part, mistake.partition(":")[0], [], mistake.partition(": ")[2])
        cause = cause_of(ex)
        print_error(self._readable(message, ex) if cause is None else with_remedy(str(cause)))
        sys.exit(2)

    def _readable(self, message: str, ex: Exception | None) -> str:
        if unknown := re.match(r"unrecognized arguments: (\S+\.(?:ya?ml|json))$", message):
            return f"{message}; a config is given as --config {unknown[1]}"
        if unknown := re.match(r"unrecognized arguments: --([\w.]+)", message):
            return message + self._near(unknown[1])
        if unknown := re.match(r"Subcommand '(\w+)' does not accept option '(\S+)'", message):
            near = getattr(ex, "subcommand_parser", self)._near(unknown[2])
            return f"{self._where(unknown[2]) or unknown[2]}: {unknown[1]} has no option {unknown[2]}{near}"
        if unknown := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message):
            return message + suggestion(unknown[1], re.findall(r"\w+", unknown[2]))
        if mistake := self._unimportable(message):
            key, _, reason = mistake.partition(": ")
            return f"{self._option(key) or self._where(key.rpartition('.')[2]) or key}: {reason}"
        if mistake := self._unknown_class(message):
            return mistake
        if "Problems parsing config" in message and (broken := broken_config(getattr(self, "args", []))):
            return broken
        for pattern, replacement in _REWRITES:
            message = re.sub(pattern, replacement, message, flags=re.DOTALL)
        message = re.sub(r'^Parser key "(\S+)":\s*(?=\S+ is not a class)', r"\1: ", message)
        if misfit := self._misfit(message):
            return misfit
        return message

    def _unimportable(self, message: str) -> str:
        """For a class that cannot be imported: the option, the import's own message and the file; empty for other mistakes."""
        option = re.search(r'Parser key "(\S+?)"', message)
        if not option or not self._classes_for(option[1]):
            return ""
        for inner, *paths in _CLASS_PATH.findall(message):
            path = "".join(paths)
            if problem := import_problem(path):
                module, _, name = path.rpartition(".")
                near = suggestion(name, dir(sys.modules.get(module)), f"{module}.{{}}")
                return f"{option[1]}{inner and f'.{inner}'}: cannot import {path}: {problem}{near}"
        return ""

    def _classes_for(self, key: str) -> dict[str, type]:
        return known_classes(next((type_of(action) for action in self._actions if action.dest == key), None))

    def _unknown_class(self, message: str) -> str:
        """For an unknown class or a base class: the option, and the classes that it takes; empty for other mistakes."""
        unknown = re.search(
            r'Parser key "(\S+)":.*Expected (a dot import path string: |an instantiatable class, but )(\S+)', message, re.DOTALL
        )
        if not unknown:
            return ""
        known = self._classes_for(unknown[1])
        if unknown[2].startswith("an"):
            return _which(unknown[1], unknown[3].rpartition(".")[2], known)
        near = suggestion(unknown[3], known) or f"; give one of {', '.join(known)}, or module.Class"
        return f"{unknown[1]}: unknown class {unknown[3]}{near}"

    def _misfit(self, message: str) -> str:
        """For a value of another type: the option, the value and the accepted types; empty for other mistakes."""
        unknown = _MISFIT.fullmatch(message)
        wanted = _wanted(unknown[2]) if unknown else ""
        if not unknown or not wanted:
            return ""
        wanted = _TRAINED_WITH if unknown[1] == "trainer.precision" else wanted
        value = unknown[3].strip()
        if wanted.startswith("text") and re.match(r"\{'|Namespace\(", value):
            wanted += "; put text that contains ': ' in quotes (in a shell '\"text\"')"
        return f"{self._option(unknown[1]) or unknown[1]}: {shorten(value)} does not fit; give {wanted}"

    def _option(self, key: str) -> str:
        """The option of a key, if it is among the arguments; else empty."""
        options = [argument.partition("=")[0] for argument in getattr(self, "args", [])]
        return f"--{key}" if f"--{key}" in options else ""

    def _placed(self, refusal: Refusal) -> str:
        where = self._where(refusal.name)
        if refusal.misfit:
            return f"{where or refusal.name}: {refusal.misfit}"
        key = _plain(where.rpartition(": ")[2].removeprefix("--")).rpartition(".")[0] or "KEY"
        if inspect.isabstract(refusal.part):
            return _which(key, refusal.part.__name__, known_classes(refusal.part))
        near = of_trl(refusal.name) or suggestion(refusal.name, refusal.names, f"--{key}.{{}}")
        near = near or f"; --{key}.help={refusal.part.__name__} lists its options"
        return f"{f'{where}: ' if where else ''}{refusal.part.__name__} has no option {refusal.name}{near}"

    def _where(self, name: str) -> str:
        """Where an unknown name was given: the option on the command line, or the file and key; empty if it is not found."""
        options = (argument.partition("=")[0] for argument in self.args)
        given = {option.removeprefix("--"): option for option in options if re.fullmatch(rf"--.*\.{re.escape(name)}", option)}
        places = dict(given)
        for file in config_paths(self.args):
            with suppress(OSError, yaml.YAMLError), open(file, encoding="utf-8") as text:
                keys = _keys(yaml.safe_load(text))
                places |= {key: f"{file}: {key}" for key in keys if _plain(f".{key}").endswith(f".{name}")}
        places |= given  # an option overrides a file
        if len(places) > 1:  # elsewhere the same name may be valid
            known = set(self._names())
            places = {key: place for key, place in places.items() if _plain(key) not in known} or places
        return next(iter(places.values()), "")

    def _names(self) -> list[str]:
        own = [option.removeprefix("--") for option in self._option_string_actions if not option.endswith((".help", "+"))]
        return [*own, *_of_known_classes(self.parts)]

    def _near(self, name: str) -> str:
        """A hint at the option that was meant, which has a similar spelling or ending."""
        if theirs := of_trl(name.rpartition(".")[2]):
            return theirs
        names = self._names()
        near = [full for full in names if full.endswith(f".{name}")]
        if not near:
            ends = {full if "." in name else full.rpartition(".")[2]: full for full in reversed(names)}
            near = [ends[end] for end in get_close_matches(name, ends, n=1, cutoff=0.75)]
        return f"; did you mean --{near[0]}?" if near else f"; {self.command} --help lists all options"


_MISFIT = re.compile(
    r'Parser key "(\S+)":((?:(?!Parser key|class_path).)*Expected an? .*?)'
    r"(?:\. Got|\s+Given value type: \S+ \S+\s+Given) value: (.*)",
    re.DOTALL,
)
# Paths of classes in a message: in a config, given to an option of a class (with its key), or to the option itself.
_PATH = r"(\w+(?:\.\w+)+)"
_CLASS_PATH = re.compile(rf"(?:class_path'?[:=]? ?|NestedArg\(key='(.*?)', val=)'{_PATH}'|G(?:iven|ot) value: {_PATH}$")
_TRAINED_WITH = "32-true, bf16-mixed or 16-mixed"  # among all precisions of Lightning
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


def _wanted(expected: str) -> str:
    """The values that an option takes, from jsonargparse's list of types; empty unless all types are plain."""
    kinds = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\]|\S+)", expected)
    found = []
    for kind in kinds:
        if literal := re.match(r"typing\.Literal\[(.*)\]", kind):
            found += [part.strip("'") for part in literal[1].split(", ")]
        else:
            found.append(_KINDS.get(kind.removeprefix("<class '").removesuffix("'>"), ""))
    if not all(found):
        return ""
    return " or ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))


def _public(path: str) -> str:
    kind = imported_class(path)
    return path if kind is None else public_path(kind)


def _which(key: str, base: str, known: Iterable[str]) -> str:
    return f"{key}: no {base} is named yet; name it first, one of {', '.join(known)}"


def _of_known_classes(parts: Mapping[str, type]) -> Iterator[str]:
    """Options of our classes under each key, and options of the classes that they take as arguments."""
    for key, base in parts.items():
        for part in filter(is_ours, known_classes(base).values()):
            parser = jsonargparse.ArgumentParser()
            parser.add_class_arguments(part, key, as_group=False, fail_untyped=False)
            for action in [action for action in parser._actions if type_of(action) is not None]:
                yield action.dest
                for inner in filter(is_ours, known_classes(type_of(action)).values()):
                    own = inspect.signature(inner).parameters.values()
                    named = [entry.name for entry in own if entry.kind is not inspect.Parameter.VAR_KEYWORD]
                    yield from (f"{action.dest}.{name}" for name in [*named, *constructor_defaults(inner)])


def _plain(key: str) -> str:
    return key.replace(".init_args.", ".")


def _keys(config: Any, above: str = "") -> Iterator[str]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, value in items:
        key = f"{above}.{name}" if above else str(name)
        yield key
        yield from _keys(value, key)


def type_of(action: Any) -> Any:
    """The type hint of an option, which jsonargparse does not make public; None for its own `--KEY.help`."""
    return None if action is None or action.dest.endswith(".help") else getattr(action, "_typehint", None)


def known_classes(kind: Any) -> dict[str, type]:
    """Name -> class for all imported classes that an option of this type accepts, without private and abstract ones."""
    found: dict[str, type] = {}
    waiting = [kind]
    while waiting:
        current = waiting.pop(0)
        if not inspect.isclass(current) or isinstance(current, GenericAlias):
            waiting += [part for part in get_args(current) if part is not Ellipsis]
        elif current.__module__.partition(".")[0] not in sys.stdlib_module_names:
            waiting += current.__subclasses__()
            public = not current.__name__.startswith("_") and "<locals>" not in current.__qualname__
            if public and not inspect.isabstract(current) and not _is_internal(current):
                found.setdefault(current.__name__, current)
    return dict(sorted(found.items(), key=lambda item: (not is_ours(item[1]), item[0])))


def _is_internal(part: type) -> bool:
    """Whether a class of ours is only a base class: missing in `__all__` of its module or package or, without one, subclassed."""
    places = [sys.modules.get(name) for name in (part.__module__, part.__module__.rpartition(".")[0])]
    named = next((place.__all__ for place in places if hasattr(place, "__all__")), None)  # type: ignore[union-attr]
    return is_ours(part) and (any(map(is_ours, part.__subclasses__())) if named is None else part.__name__ not in named)


def is_ours(part: type) -> bool:
    """Whether a class is one of this package."""
    return part.__module__.startswith("hybrid_lightning.")


def suggestion(name: str, names: Iterable[str], shown: str = "{}") -> str:
    """`; did you mean X?` if a name is similar to another one, else ""."""
    near = get_close_matches(name, sorted(set(names)), n=1, cutoff=0.7)
    return f"; did you mean {shown.format(near[0])}?" if near else ""


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error in a chain that is meant for the user; jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, (HybridLightningError, MisconfigurationException, FileNotFoundError)) or is_machine_error(error):
            return error
        error = error.__cause__
    return None


def unwrapped(error: BaseException) -> BaseException:
    """The error that a constructor raised, without jsonargparse's union error around it, which ends with the whole config."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__ is not None:
        error = error.__cause__
    return error


def print_error(message: str) -> None:
    """Print an error message as one line."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")

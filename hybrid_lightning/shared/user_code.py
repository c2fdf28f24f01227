"""The user's code: functions by name, regular expressions, and exceptions on one line. `user_calls.py` calls the functions."""

import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid_lightning.errors import ConfigError, HybridLightningError, one_line
from hybrid_lightning.shared.stopping import RunStopped

# Folders with code that is not the user's: this package and installed libraries. Messages name the last line outside of them.
_NOT_THEIRS = tuple({str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib"))})


@cache
def load_function(path: str, option: str = "function") -> Callable[..., Any]:
    """Import the module or run the file, once per process, and return the named function.

    Args:
        path: `package.module.function`, `package.module:function` or `path/to/file.py:function`.
        option: Name of the option, for messages.

    Raises:
        ConfigError: If the file, module or function does not exist, or cannot be imported.
    """
    if path.endswith(".py"):
        raise ConfigError(f"{option}={path!r} names a file but no function in it; write {path}:function")
    if "<" in path:  # Python's notation for nested functions and lambdas
        raise ConfigError(f"{option}={path!r} is a nested function or lambda; define it at the top level of a module")
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not place or not name.isidentifier():
        raise ConfigError(f"{option}={path!r}; give package.module.function or path/to/file.py:function")
    try:
        module = _file(path, option, Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{option}={path!r}: there is no module {error.name!r}; correct the name, start in the folder of the module, or "
                "give its file, as in my_code.py:function"
            ) from error
        raise ConfigError(f"{option}={path!r}: {place} needs the module {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:  # SystemExit: a script that parses arguments, without `if __name__ == "__main__"`
        raise ConfigError(f"{option}={path!r}: importing {place} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ConfigError(f"{option}={path!r}: {place} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function  # type: ignore[no-any-return]


def import_problem(path: str) -> str:
    """Why `package.module.Class` cannot be imported: the import's own message, and the file; empty if it can be imported."""
    place, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):  # a module that theirs imports
            return f"importing {_found_file(place)} raised {describe_error(error)}"
        file, folders = error.name.replace(".", "/") + ".py", ", ".join(filter(_is_theirs, sys.path))
        where = f"{file} is neither in {folders} nor in an installed package" if folders else f"no package has {file}"
        return f"{one_line(error)}; {where}; correct the name, or start in the folder of that file"
    except (Exception, SystemExit) as error:
        return f"importing {_found_file(place)} raised {describe_error(error)}"
    return "" if hasattr(module, name) else f"{_found_file(place)}: module {place!r} has no attribute {name!r}"


def _is_theirs(folder: str) -> bool:
    installed = (*_NOT_THEIRS, sysconfig.get_path("scripts"))
    return Path(folder).is_dir() and not folder.startswith(installed) and Path(folder).name != "site-packages"


def _found_file(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return module if spec is None or spec.origin is None else spec.origin


def _file(path: str, option: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"{option}={path!r}: there is no file {file.absolute()}; correct the path")
    # The module gets a unique name that is the same in every process.
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look up modules there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def compile_pattern(
    pattern: str, groups: int | None = None, option: str = "pattern", flags: re.RegexFlag = re.DOTALL
) -> re.Pattern[str]:
    """Compile a regular expression; by default `.` also matches line breaks.

    Args:
        pattern: The regular expression.
        groups: Required number of groups; None for any number.
        option: Name of the option, for messages.
        flags: As in `re.compile`.

    Raises:
        ConfigError: If it is not a regular expression, or has a different number of groups.
    """
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"{option}={pattern!r} is not a regular expression: {error}; correct it") from error
    if groups is not None and compiled.groups != groups:
        raise ConfigError(
            f"{option}={pattern!r} has {compiled.groups} groups instead of {groups}; put only the answer in ( ), and write other "
            "groups as (?: )"
        )
    return compiled


@contextmanager
def in_user_code(owner: Any, method: str) -> Iterator[None]:
    """Context for running a method of `owner`, an object or a class, that may be the user's own.

    Raises:
        HybridLightningError, RunStopped: If the method raises one of these.
        ConfigError: If the method raises anything else; the message is one line.
    """
    try:
        yield
    except (HybridLightningError, RunStopped):
        raise
    except (Exception, SystemExit) as error:
        name = (owner if isinstance(owner, type) else type(owner)).__name__
        raise ConfigError(f"{name}.{method} raised {describe_error(error)}; correct it") from error


def describe_error(error: BaseException) -> str:
    """One line about an exception in the user's code, with the line of code that led to it."""
    others = (*_NOT_THEIRS, "<frozen")  # Python's own import, above a file that is not Python
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    line = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{kind_and_text(error, 200)}{line}"


def kind_and_text(error: BaseException, length: int = 300) -> str:
    """One line about an exception in the user's code, cut if it is long."""
    try:
        text = one_line(error, length).encode(errors="backslashreplace").decode()
    except Exception:  # raised by the exception's own __str__
        text = "without a text"
    return f"{type(error).__name__}: {text}"

"""Functions named in a config: `package.module.function`, `package.module:function` or `path/to/file.py:function`."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid_lightning.errors import ConfigError


@cache
def load_function(path: str) -> Callable[..., Any]:
    """Import the module or run the file, once, and take the function out of it.

    Raises:
        ConfigError: If there is no such file, module or function, or it cannot be imported.
    """
    if path.endswith(".py"):
        raise ConfigError(f"function={path!r} is a file without a function: name one of it, as in {path}:function")
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not place or not name.isidentifier():
        raise ConfigError(f"function={path!r}: give package.module.function or path/to/file.py:function")
    try:
        module = _file(path, Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise ConfigError(
                f"function={path!r}: there is no module {error.name!r}; correct the name, start from the folder that it lies in, "
                "or give its file, as in my_rewards.py:function"
            ) from error
        raise ConfigError(f"function={path!r}: {place} needs the module {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:  # SystemExit: a script that parses arguments, without `if __name__ == "__main__"`
        raise ConfigError(f"function={path!r}: importing {place} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ConfigError(f"function={path!r}: {place} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function  # type: ignore[no-any-return]


def _file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"function={path!r}: there is no file {file.absolute()}; correct the path")
    # A name that no other module has, and the same in each process.
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

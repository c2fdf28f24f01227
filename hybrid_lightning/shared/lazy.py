"""`lazy_names`: imports public names on first use, from the package's stub, which is their only list.

The stub, such as `engine/__init__.pyi`, has the line `from MODULE import NAME as NAME` for each name; type checkers and editors
also read it. So classes have short paths that do not change when files move, and code that needs only torch does not wait for
PEFT. Every process imports this module, so it imports little.
"""

import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package from the stub beside its file; `__all__` gives the stub's names."""
    modules: dict[str, str] = {}  # name -> module that has it; empty until the first use of a name

    def read() -> dict[str, str]:
        if not modules:
            import ast

            with open(f"{file}i", encoding="utf-8") as stub:
                imports = [node for node in ast.parse(stub.read()).body if isinstance(node, ast.ImportFrom)]
            modules.update({alias.name: str(node.module) for node in imports for alias in node.names})
        return modules

    def find(name: str) -> Any:
        if name == "__all__":
            return sorted(read())
        if name not in read():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(modules[name]), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *read()})

    return find, listed


def load_names(package: str) -> None:
    """Import all public names of a package now, so that its classes are found among the subclasses of their base."""
    from importlib import import_module

    module = import_module(package)
    for name in module.__all__:
        getattr(module, name)

"""Installed packages that programs may import beside the standard library."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hybrid_lightning.errors import ConfigError


def find_packages(names: Sequence[str]) -> tuple[str, ...]:
    """Files and folders of packages; nothing of them is imported here.

    Args:
        names: As in an import, such as "sortedcontainers" or "numpy"; what a package needs itself has to be named too.

    Raises:
        ConfigError: If one is not installed.
    """
    paths: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = folders or ([spec.origin] if spec and spec.origin and Path(spec.origin).is_file() else [])
        if not found:
            raise ConfigError(
                f"packages: {name!r} is not installed: pip install it where training runs, or leave it out; give the name that "
                "an import uses"
            )
        libraries = Path(found[0]).with_name(f"{name}.libs")  # where wheels put shared libraries
        paths += [*found, *([str(libraries)] if libraries.is_dir() else [])]
    return tuple(paths)

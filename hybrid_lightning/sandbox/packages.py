"""Installed packages that programs may import beside the standard library."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sandbox.launch import Box, launch
from hybrid_lightning.sandbox.limits import Limits


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


def check_packages(names: Sequence[str], paths: Sequence[str], mechanisms: Sequence[str], limits: Limits) -> None:
    """Import packages as programs do: where that fails, every program that needs one would fail, and earn nothing.

    Args:
        names: As in an import.
        paths: Where they are (see `find_packages`).
        mechanisms: Of isolation, as programs have them.
        limits: As programs have them.

    Raises:
        ConfigError: If one cannot be imported.
    """
    for name in names:
        ran = launch([Box("script", {"setup": "", "source": f"import {name}"})], mechanisms, limits, paths)
        if not ran.in_time or ran.endings.get("script"):
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else ran.endings.get("script") or f"not done after {limits.wall_seconds:g} s"
            raise ConfigError(
                f"packages: {name!r} cannot be imported in the sandbox ({reason}): "
                "name what it needs itself too, install it where any user may read it, or give programs more memory and time"
            )

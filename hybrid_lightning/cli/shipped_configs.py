"""Configs that come with the package, by name: `--config gspo` and `--config loss/dapo`, from any working directory."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from hybrid_lightning.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"  # a link to configs/ in a source tree


def config_names() -> list[str]:
    """Names of all configs, complete ones first: `gspo`, and `loss/dapo` for an overlay."""
    paths = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml")]
    return [path.as_posix() for path in sorted(paths, key=lambda path: (len(path.parts), path))]


def read_config(name: str) -> str:
    """The text of a config; ConfigError if the name is unknown."""
    if name not in config_names():
        near = get_close_matches(name, config_names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "the command 'configs' lists all of them"
        raise ConfigError(f"no config is called {name!r}; {hint}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def config_list() -> str:
    """A line for each config: its name, and the first sentence of its text."""
    width = max(map(len, config_names()))
    lines = []
    for name in config_names():
        comment = read_config(name).partition("\n#\n")[0].replace("\n# ", " ").partition("\n")[0].lstrip("# ")
        sentence = re.split(r"(?<!Dr)\. (?=[A-Z])", comment)[0]
        lines.append(f"{name:<{width}}  {re.sub(r': an overlay over .*', '', sentence).rstrip('.')}")
    return "\n".join(lines)


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Replace each config name in a command's arguments by a path, and print the chosen files.

    `gspo` stands for the file `gspo` or `gspo.yaml` in the working directory, or else for the shipped config of that name. A
    missing path such as `configs/gspo.yaml` also stands for the shipped config.

    Raises:
        ConfigError: If there is neither such a file nor such a config.
    """
    found, is_config = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--config=") else ("", "", argument)
        if is_config or equals:
            argument = f"{option}{equals}{_path(value)}"
        is_config = argument in ("--config", "-c")
        found.append(argument)
    return found


def _path(given: str) -> str:
    name = re.sub(r"\A(?:configs/)?(.+?)(?:\.yaml)?\Z", r"\1", given)
    there = next((path for path in (given, f"{given}.yaml") if Path(path).is_file()), None)
    if there == given != name:  # a path as written
        return given
    if there is None and name not in config_names():
        if re.search(r"[.\n]|\A[/~]", given):  # a path, or text: the parser reports the mistake
            return given
        read_config(name)
    path = there or str(FOLDER / f"{name}.yaml")
    sys.stderr.write(f"config {given}: {f'{path} in this folder' if there else f'shipped with hybrid_lightning, {path}'}\n")
    return path

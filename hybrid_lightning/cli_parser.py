"""The parser of the command line: how values are read, and how a mistake is said in one line."""

import re
import sys
from typing import Any, NoReturn

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hybrid_lightning.errors import HybridLightningError

# What jsonargparse says -> what a reader of one line can use.
_REWRITES = (
    (r"Does not validate against any of the Union subtypes\s+Subtypes: \[.*?\]\s+Errors:", ""),
    (r"-\s+Expected a path but \S+ either not accessible or invalid\s+", ""),
    (r"Expected a dot import path string: (\S+).*", r"unknown class \1; give module.Class, or a class of ours"),
    (r"\s*- Expected a <class 'NoneType'>", ""),
    (r"\s*Given value type:.*?Given value: (.*)", r"; got \1"),
    (r"Expected a <class '([\w.]+)'>", r"expected \1"),
    (r"- Expected a typing\.Literal\[(.*?)\]", r"or one of \1"),
    (
        r"Expected an instantiatable class, but \S*?(\w+) is abstract; got NestedArg\(key='(\w+)'.*",
        r"before its argument \2 say which \1, as in --form MergedModel --form.dtype=float32",
    ),
    (r"^Unexpected config:\s*$", "a config must be a mapping such as 'trainer: {max_steps: 10}', but is empty"),
    (r"^Unexpected config:\s*", "a config must be a mapping such as 'trainer: {max_steps: 10}', but is: "),
    (r'(Parser key "\S+":)\s*(?:-\s+)+', r"\1 "),
    (r"(Option '\S+' is not accepted)\s*$", r"\1; --KEY.help=CLASS lists those of a class, as in --model.reward.help=ExactMatch"),
    (
        r"(?:Import path (\S+) does not correspond to a subclass of RewardFunction|Unexpected import path format: (\S+\.py:\w+))",
        r"\1\2 is no class derived from RewardFunction; a function is given by class_path FunctionReward with function: \1\2",
    ),
)


_load_yaml = jsonargparse.get_loader("yaml")


def _load_value(text: str) -> Any:
    """YAML, except for two texts that jsonargparse would read otherwise than they are meant.

    It reads the strings of a config as YAML once more, and would turn `answer_pattern: '####\\s*(.+)'`, for YAML a comment alone,
    into null. And it hands a null for an argument of a part on as Python writes it: `--data.format.system_prompt=null` would put
    the word None in front of every prompt.
    """
    value = _load_yaml(text)
    if text == "None":
        return None
    return text if value is None and text.lstrip().startswith("#") else value


jsonargparse.set_loader("yaml", _load_value, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Refuses abbreviated options, and ends every error with one line that says what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would take --trainer.max_epoch=3 silently for max_epochs.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with 2."""
        cause = cause_of(ex)
        print_error(_readable(message) if cause is None else str(cause))
        sys.exit(2)


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error in a chain that was raised for the user; jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, (HybridLightningError, MisconfigurationException, FileNotFoundError)):
            return error
        error = error.__cause__
    return None


def unwrapped(error: BaseException) -> BaseException:
    """What a constructor raised, from below jsonargparse's account of a union, whose last line is the whole config."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _readable(message: str) -> str:
    for pattern, replacement in _REWRITES:
        message = re.sub(pattern, replacement, message, flags=re.DOTALL)
    return message


def print_error(message: str) -> None:
    """Say on one line of the error output what is wrong."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")

"""What environments may change for the whole process although training depends on it, and how it is put back."""

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """States of the global generators of Python, NumPy and torch (of the CPU)."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor

    @classmethod
    def now(cls) -> Self:
        """The states as they are."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """The states after each generator was given the same seed, in [0, 2^31)."""
        generator = torch.Generator().manual_seed(seed)
        return cls(random.Random(seed).getstate(), np.random.RandomState(seed).get_state(), generator.get_state())

    def restore(self) -> None:
        """Let the global generators go on from these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)

    def same(self, other: "RandomStates") -> bool:
        """Whether the generators would go on in the same way."""
        numpy = all(np.array_equal(mine, theirs) for mine, theirs in zip(self.numpy, other.numpy, strict=True))
        return self.python == other.python and numpy and torch.equal(self.torch, other.torch)


def _set_errors(rules: list[Any]) -> None:
    """Let these warnings alone be errors; a library may hide its own ones."""
    warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error" or rule in rules]  # type: ignore[index]


# What environments may change for the whole process although training depends on it: name -> how it is read and set.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.use_deterministic_algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "sys.stdout": (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    "sys.stderr": (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    "logging.disable": (lambda: logging.root.manager.disable, logging.disable),
    "warnings": (lambda: [rule for rule in warnings.filters if rule[0] == "error"], _set_errors),
}


class ProcessSettings:
    """Settings of the process, as they are now."""

    def __init__(self) -> None:
        self._values = {name: read() for name, (read, _) in _SETTINGS.items()}

    def restore(self) -> list[str]:
        """Set them as they were. Returns the names of those that had changed."""
        changed = [name for name, (read, _) in _SETTINGS.items() if read() != self._values[name]]
        for name in changed:
            _SETTINGS[name][1](self._values[name])
        return changed


@contextmanager
def exits_said(name: str) -> Iterator[None]:
    """Within this context a thread that calls `os._exit` says whose code it runs, and ends the process as one that has failed.

    Args:
        name: Whose code runs in threads.
    """
    end, process = os._exit, os.getpid()

    def said(code: int) -> None:
        if os.getpid() == process and threading.current_thread() is not threading.main_thread():
            remedy = "let it raise, or run it in processes (episodes.workers)"
            os.write(2, f"error: {name} has ended the process by os._exit({code}); {remedy}\n".encode())
            code = code or 1
        end(code)

    os._exit = said  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = end

"""The exception classes: every error that a user can cause is a `HybridLightningError`.

Each class also derives from the built-in class that a Python user would expect, so that `except ValueError` works. A message is
one line with the cause, the received value and the remedy; the command line prints it as its last line. `one_line` and `shorten`
bring other libraries' messages into that form.
"""

from typing import Any


class HybridLightningError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(HybridLightningError, ValueError):
    """A configuration value is wrong, or two values contradict each other."""


class DataError(HybridLightningError, ValueError):
    """A data file, row or column is missing or malformed."""


class ModelError(HybridLightningError, ValueError):
    """A model cannot be found or loaded, or does not have the expected modules."""


class PlanError(HybridLightningError, ValueError):
    """An adapter plan is malformed or belongs to another model."""


class RewardError(HybridLightningError, RuntimeError):
    """A reward function raised, or returned something other than one finite number per completion."""


class JudgeError(RewardError):
    """A judge does not answer, or some reward could not score too many completions."""


class RolloutError(HybridLightningError, RuntimeError):
    """A rollout engine does not answer, fails, or has different weights than the policy."""


class EpisodeError(RolloutError):
    """The environment itself failed in too many episodes."""


class SandboxError(HybridLightningError, RuntimeError):
    """Untrusted programs cannot be isolated on this machine, or cannot be run at all."""


class CalibrationError(HybridLightningError, RuntimeError):
    """The calibration rollouts carry no signal for scoring modules."""


class CheckpointError(HybridLightningError, RuntimeError):
    """A checkpoint does not belong to this model, plan or run."""


class TrainingError(HybridLightningError, RuntimeError):
    """Training has diverged: a gradient is not finite."""


class DiagnosisError(HybridLightningError, RuntimeError):
    """`doctor` found that nothing can be learned."""


def one_line(error: BaseException, length: int = 300) -> str:
    """Text of another library's exception for an error message, on one line and cut if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]} ..."


def shorten(value: Any, length: int = 80) -> str:
    """Repr of a value for an error message, with the middle cut out if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 15]} ... {text[-10:]}"

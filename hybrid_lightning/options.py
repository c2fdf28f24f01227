"""`Option`: what depends on an option, declared beside the constructor that takes it.

A class lists its options in `OPTIONS`: name of the argument -> `Option`. From these lists alone follow whether stopped scoring
may go on, and what a change at a resume does. An option of a part, such as a loss, that the part's class does not list has what
its owner declares for the part (`model.loss.clip_low` that of `model.loss`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

# Effects of a change at a resume: what begins anew.
ROLLOUT = "rollout"  # the rollout in progress is given up, because its micro-batches were made with the old setting
EPOCH = "epoch"  # Lightning's epoch, which now has another number of micro-batches
MEASURED = "measured"  # accuracies so far, which cannot be compared with those measured from now on
BEST = "best"  # which checkpoint is the best, for the same reason
REFUSED = "refused"  # the change is not possible

Effects = frozenset[str]
NOTHING: Effects = frozenset()
MADE_BY: Effects = frozenset({ROLLOUT})
FIXED: Effects = frozenset({REFUSED})
SIZES: Effects = frozenset({ROLLOUT, EPOCH})
ACCURACY: Effects = frozenset({MEASURED, BEST})


@dataclass(frozen=True)
class Option:
    """What depends on an option."""

    at_resume: Effects = NOTHING  # effects of a change when a run goes on from a checkpoint
    scores: bool = False  # whether the scores of modules depend on it
    updates: bool = False  # whether those of a scorer of updates do, and of no other


def options_of(kind: type) -> Mapping[str, Option]:
    """The options that a class and its parents list.

    Example:
        >>> class Parent:
        ...     OPTIONS = {"seed": Option(FIXED, scores=True)}
        >>> class Child(Parent):
        ...     OPTIONS = {"rate": Option()}
        >>> list(options_of(Child))
        ['seed', 'rate']
    """
    return {name: option for parent in reversed(kind.__mro__) for name, option in vars(parent).get("OPTIONS", {}).items()}

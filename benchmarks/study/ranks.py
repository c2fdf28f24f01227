"""The rank at which LoRA alone trains as many parameters as the hybrid does."""

import math
from statistics import fmean

from benchmarks.study.methods import Method
from benchmarks.study.records import of_method
from benchmarks.study.store import Store


def rank_of(method: Method, store: Store, task: str) -> int | None:
    """The rank that a method leaves open; None for all others.

    Raises:
        SystemExit: If the hybrid or LoRA has not been tuned yet, whose runs say how many parameters they train.
    """
    if not method.match_state:
        return None
    hybrid, lora = (of_method(store, "sweep", task, name) for name in ("hybrid", "lora"))
    if not hybrid or not lora:
        raise SystemExit(f"error: {method.name} needs the parameters of hybrid and lora: sweep these two on {task} first")
    of_one = lora[0].trainable_parameters / lora[0].options["adapter.rank"]
    return math.ceil(fmean(record.trainable_parameters for record in hybrid) / of_one)

"""Many small decompositions at a time, each on one thread: LAPACK gains little from threads of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")

MOST_WORKERS = 16  # each holds a float64 copy of its matrix


def map_on_workers(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """Call a function for each item on as many threads as torch may use; torch releases the interpreter's lock meanwhile.

    Inside it torch uses one thread, so that results do not depend on how many there are. The first error ends the work: what has
    not begun by then is left out.

    Args:
        function: safe to call from several threads.
        items: its arguments.

    Returns:
        The results, in the order of the items.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MOST_WORKERS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also what later threads would start with

import threading
import time

import pytest
import torch

from hybrid_lightning.adapters.spectra import map_on_workers


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_items_keep_their_order_and_run_at_the_same_time():
    both = threading.Barrier(2, timeout=20)

    def wait(item: int) -> int:
        both.wait()  # passes only if two of them are running
        return 10 * item + torch.get_num_threads()

    assert map_on_workers(wait, [3, 1, 2, 4]) == [31, 11, 21, 41]
    assert torch.get_num_threads() == 2
    assert map_on_workers(wait, []) == []


def test_an_error_ends_the_work():
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise KeyError(item)
        time.sleep(0.02)

    with pytest.raises(KeyError, match="0"):
        map_on_workers(work, range(200))
    assert len(begun) < 100 and torch.get_num_threads() == 2


def test_later_threads_start_with_the_old_number():
    map_on_workers(abs, [1, 2])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]

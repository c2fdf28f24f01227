import os
import sys
from pathlib import Path

import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import train_each
from tiny_runs import write_model, write_sums

sys.path.append(str(Path(__file__).parents[1] / "rollout"))  # for the fake vLLM server


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model and 24 sums, 19 of them for training."""
    folder = tmp_path_factory.mktemp("sharding")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl", 24)
    return folder


@pytest.fixture(scope="session")
def train_on(folder, tmp_path_factory):
    """Makes the named runs on this many ranks, one after another; each rank's findings: name -> result.

    One rank is this process.
    """

    def start(ranks, jobs, **arguments):
        root = tmp_path_factory.mktemp("runs")
        arguments = {"folder": folder, "root": root / "run", "devices": ranks, **arguments}
        if ranks == 1:
            return [train_each(jobs, **arguments)]
        return run(ranks, root / "ranks", train_each, timeout_s=300, jobs=jobs, **arguments)

    return start


@pytest.fixture(scope="module", autouse=True)
def as_ranks_have_it():
    """One thread, since several round sums differently and then draw other tokens; a run's own setting is undone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # which Lightning sets with it

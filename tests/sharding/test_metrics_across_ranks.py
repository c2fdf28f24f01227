"""Two gloo processes give the metrics of one, although the sampler repeats a prompt and no rank sees all sets."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks_of_tests import run

from hybrid_lightning.metrics import ProblemMeans

SETS = ["quiz", "riddles", "riddles"]
INDEX = torch.tensor([3, 3, 21])
SHARE = torch.tensor([0.5, 1.0, 0.0])
LENGTH = torch.tensor([2.0, 6.0, 2.0])


def update(metric, rows):
    metric.update([SETS[row] for row in rows], INDEX[rows], {"share": SHARE[rows], "length": LENGTH[rows]})


def values_of(metric):
    return {name: {key: float(value) for key, value in part.items()} for name, part in metric.compute().items()}


def work():
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    metric = ProblemMeans({"share": 2, "length": None})
    for rows in [[[0, 1], [0]], [[2, 2, 2]]][rank]:  # problem 0 twice, problem 2 three times, and no quiz on rank 1
        update(metric, rows)
    found = values_of(metric)
    dist.destroy_process_group()
    return found


def test_every_problem_counts_once_whatever_rank_saw_it(tmp_path):
    ranks = run(2, tmp_path, work)
    single = ProblemMeans({"share": 2, "length": None})
    update(single, [0, 1, 2])
    expected = values_of(single)
    assert expected["riddles"]["share"] == 0.5 and expected["riddles"]["length"] == 4.0 and expected["quiz"]["problems"] == 1
    assert expected[""]["share"] == 0.5 and expected[""]["length"] == pytest.approx(3.0)
    assert ranks == [expected] * 2

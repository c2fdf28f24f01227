"""Two gloo processes give the metrics of one, although the sampler repeats a prompt to make the ranks even."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hybrid_lightning.metrics import CompletionMetrics

INDEX = torch.tensor([3, 8, 21])
CORRECT = torch.tensor([[True, False], [True, True], [False, False]])
LENGTH = torch.tensor([[1, 3], [5, 7], [2, 2]])


def update(metric, rows):
    metric.update(INDEX[rows], CORRECT[rows], CORRECT[rows].float() * 2, LENGTH[rows])


def work(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    metric = CompletionMetrics(2)
    update(metric, [[0, 2], [1, 0]][rank])  # as DistributedSampler deals three prompts to two ranks: prompt 0 twice
    result = {name: float(value) for name, value in metric.compute().items()}
    (path / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_prompt_counts_once_whatever_rank_saw_it(tmp_path):
    mp.spawn(work, args=(free_port(), tmp_path), nprocs=2)
    single = CompletionMetrics(2)
    update(single, [0, 1, 2])
    expected = {name: float(value) for name, value in single.compute().items()}
    assert expected == pytest.approx({"avg@2": 0.5, "pass@2": 2 / 3, "reward": 1.0, "length": 10 / 3})
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected)

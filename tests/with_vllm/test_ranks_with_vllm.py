"""Two processes that train, each with an engine of its own; that both use one server is in test_engines.py."""

import os

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from ranks_of_tests import run
from tiny_runs import Log, build_adapter, build_data, build_policy, build_trainer, write_sums
from vllm_of_tests import needs_vllm, write_model

from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.rollout import Sampler, VLLMSampler, VLLMServerSampler
from hybrid_lightning.sharding import FSDP2Strategy

pytestmark = needs_vllm
SAMPLERS = {"process": VLLMSampler, "server": VLLMServerSampler, "ours": Sampler}


class Metrics(Log):
    on_before_optimizer_step = Callback.on_before_optimizer_step  # where gradients are split


def train(folder, root, sampler="process", **options):
    """A run of hybrid LoRA; the metrics of each step, except times, and the state of the process."""
    root.mkdir(parents=True, exist_ok=True)
    policy = build_policy(
        folder,
        loss=GSPOLoss(),
        sampler=SAMPLERS[sampler](max_new_tokens=6, **options),
        correction=TokenTruncation(),
        minibatches_per_rollout=2,
    )
    torch.manual_seed(11)  # of LoRA's first weights
    log, flags = Metrics(), {"max_steps": 4, "devices": 2, "limit_val_batches": 1}
    trainer = build_trainer(root, build_adapter(), log, strategy=FSDP2Strategy(process_group_backend="gloo"), **flags)
    sums = write_sums(root / f"sums-{os.environ['LOCAL_RANK']}.jsonl")
    trainer.fit(policy, datamodule=build_data(sums, validation_fraction=0.25))
    timed = ("time/", "throughput/")
    steps = [{n: value for n, value in found.items() if not n.startswith(timed) and n[-2:] != "_s"} for found in log.metrics]
    return {"steps": steps, "size": dist.get_world_size(), "threads": torch.get_num_threads()}


def check(results):
    """Both ranks trained on what engines with the weights of all of them completed."""
    for result in results:
        assert result["size"] == 2 and result["threads"] == 1 and len(result["steps"]) == 4
        for number, step in enumerate(result["steps"]):
            assert step["sampling/logp_difference/max"] < 1e-3
            assert step["sampling/weights_version_lag"] == number % 2
    assert results[0]["steps"][-1]["loss"] == results[1]["steps"][-1]["loss"]


def train_all(folder, root):
    """Runs with an engine in each process, between two with our sampler."""
    return [train(folder, root / str(number), name) for number, name in enumerate(("ours", "process", "ours"))]


def test_two_ranks_train_with_an_engine_each_which_leaves_no_trace_in_the_runs_that_follow_it(tmp_path):
    folder = write_model(tmp_path / "model")
    results = run(2, tmp_path / "ranks", train_all, 400, folder=folder, root=tmp_path / "run")
    check([with_engine for _, with_engine, _ in results])
    assert all(before["steps"] == after["steps"] for before, _, after in results), "bit for bit"

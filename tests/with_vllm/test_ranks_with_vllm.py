"""Two processes that train, each with an engine of its own; that both use one server is in test_engines.py."""

import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from ranks_of_tests import run
from tiny_runs import DigitShare, build_adapter, build_data, build_trainer, write_sums
from vllm_of_tests import needs_vllm, write_model

from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.rollout import Sampler, VLLMSampler, VLLMServerSampler
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy

pytestmark = needs_vllm
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo"),
    "fsdp1": lambda: FSDP1Strategy(process_group_backend="gloo"),
}


class Log(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        timed = ("time/", "throughput/")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps.append({name: value for name, value in metrics.items() if not name.startswith(timed) and name[-2:] != "_s"})


def train(folder, strategy, root, sampler="process", url=None, steps=4):
    """A run of hybrid LoRA; the metrics of each step, a digest of the state of the process, and the trained weights."""
    os.environ["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", "0")
    root.mkdir(parents=True, exist_ok=True)
    made = {
        "process": lambda: VLLMSampler(max_new_tokens=6),
        "server": lambda: VLLMServerSampler(urls=[url], max_new_tokens=6),
        "ours": lambda: Sampler(max_new_tokens=6),
    }[sampler]()
    sizes = {"prompts_per_rollout": 4, "samples_per_prompt": 4, "minibatches_per_rollout": 2, "eval_samples": 2}
    policy = PolicyModule(
        GSPOLoss(),
        DigitShare(),
        model=str(folder),
        sampler=made,
        correction=TokenTruncation(),
        lr_full=1e-3,
        lr_lora=1e-2,
        **sizes,
    )
    torch.manual_seed(11)  # of LoRA's first weights
    log = Log()
    trainer = build_trainer(
        root, build_adapter(), log, max_steps=steps, strategy=STRATEGIES[strategy](), devices=2, limit_val_batches=1
    )
    data = build_data(write_sums(root / f"sums-{os.environ['LOCAL_RANK']}.jsonl"), validation_fraction=0.25)
    trainer.fit(policy, datamodule=data)
    return {"steps": log.steps, "size": dist.get_world_size(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_two_ranks_train_with_an_engine_each(tmp_path, strategy):
    folder = write_model(tmp_path / "model")
    results = run(2, tmp_path / "ranks", train, 240, folder=folder, strategy=strategy, root=tmp_path / "run")
    assert [len(result["steps"]) for result in results] == [4, 4]
    check(results)


def check(results):
    """Both ranks trained on what engines with the weights of all of them completed."""
    for result in results:
        assert result["size"] == 2 and result["threads"] == 1
        for number, step in enumerate(result["steps"]):
            assert step["sampling/logp_difference/max"] < 1e-3
            assert step["sampling/weights_version_lag"] == number % 2
    assert results[0]["steps"][-1]["loss"] == results[1]["steps"][-1]["loss"]


def around(folder, strategy, root):
    """Metrics of a run with our sampler, before and after one with an engine in the same process."""
    before = train(folder, strategy, root / "before", "ours")
    train(folder, strategy, root / "vllm", "process", steps=2)
    return before, train(folder, strategy, root / "after", "ours")


def test_an_engine_leaves_no_trace_in_the_runs_that_follow_it(tmp_path):
    folder = write_model(tmp_path / "model")
    for before, after in run(2, tmp_path / "ranks", around, 240, folder=folder, strategy="fsdp2", root=tmp_path / "run"):
        assert len(before["steps"]) == 4
        for one, other in zip(before["steps"], after["steps"], strict=True):
            assert one == other, "bit for bit"

"""Parts of the model on the host: the same run, and the further requirements of any other device."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from rounding import metrics_of_runs
from runs_of_tests import ADAM, assert_same_run
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torchmetrics import MeanMetric

from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.sharding import FSDP2Strategy

# Several passes a micro-batch and several micro-batches a step: gradients add up on the host.
POLICY = {**ADAM, "prompts_per_rollout": 4, "loss": GRPOLoss(kl_coef=0.02)}
POLICY |= {"sampler": Sampler(12), "max_tokens_per_micro_batch": 24}
ARGUMENTS = {"policy": POLICY, "accumulate_grad_batches": 2, "max_steps": 3}


class Policies(Callback):
    """Makes sure that it offloads at all."""

    def on_train_start(self, trainer, pl_module):
        parts = [module for module in pl_module.modules() if isinstance(module, FSDPModule)]
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        assert groups and all(type(group.offload_policy) is CPUOffloadPolicy for group in groups)


@pytest.fixture(scope="module")
def single(train_on):
    return train_on(1, {"run": ARGUMENTS})[0]["run"]


@pytest.fixture(scope="module")
def sharded(train_on, tmp_path_factory):
    """The runs of each rank."""
    path = tmp_path_factory.mktemp("offloaded") / "part.ckpt"
    fused = partial(torch.optim.AdamW, eps=1e-3, fused=True)  # which is what makes the host's step fast
    narrow = {"policy": {**ADAM, "optimizer": fused, "dtype": "bfloat16"}, "precision": "bf16-mixed", "max_steps": 2}
    narrow["gradient_clip_val"] = None  # which Lightning does not do with a fused optimizer
    offloaded = {**ARGUMENTS, "strategy": "fsdp_cpu_offload", "callbacks": (Policies(),)}
    jobs = {
        **{"narrow": {**narrow, "strategy": "fsdp"}, "narrow, offloaded": {**narrow, "strategy": "fsdp_cpu_offload"}},
        **{"part": {**offloaded, "max_steps": 1, "save": path}, "rest": {**offloaded, "ckpt_path": path}},
    }
    return train_on(2, jobs)


@pytest.mark.long
def test_it_equals_the_run_of_one_process_and_resumes_from_its_checkpoint(sharded, single):
    for rank in sharded:
        (first,), rest = rank["part"]["steps"], rank["rest"]
        assert first == pytest.approx(single["steps"][0], **metrics_of_runs()) and len(rest["steps"]) == 2
        assert_same_run(rest, single)


@pytest.mark.long
def test_weights_of_sixteen_bits_are_offloaded_too(sharded):
    for rank in sharded:
        plain, offloaded = (rank[name]["weights"] for name in ("narrow", "narrow, offloaded"))
        assert all(torch.equal(weight, offloaded[name]) for name, weight in plain.items())


def on(kind, backend=None):
    """The strategy as on the first device of a kind that is not here."""
    made = FSDP2Strategy(cpu_offload=True, process_group_backend=backend)
    made.parallel_devices = [torch.device(kind, 0) if kind != "cpu" else torch.device("cpu")]
    made.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    return made


def test_collectives_are_there_for_the_host_and_the_device_and_the_group_is_bound_to_none(monkeypatch):
    whole = dict.fromkeys((None, "nccl", "cuda:nccl"), "cpu:gloo,cuda:nccl")
    backends = {**whole, "cuda:nccl,cpu:mpi": "cuda:nccl,cpu:mpi"}
    assert {name: on("cuda", name)._get_process_group_backend() for name in backends} == backends
    assert on("cpu")._get_process_group_backend() == "gloo"
    assert on("cuda").offloads and not on("cpu").offloads
    group = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda strategy: None)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=group))
    for kind, bound in (("cpu", torch.device("cuda", 0)), ("cuda", None)):
        on(kind)._setup_distributed()
        assert group.bound_device_id == bound


def test_only_what_is_not_split_moves_to_the_device():
    strategy = on("meta")
    strategy.model = nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": MeanMetric()})
    strategy.model_to_device()
    assert strategy.model["linear"].weight.device.type == "cpu" and strategy.model["metric"].device.type == "meta"

"""Parts of the model on the host: the same run, and what a device that is not the host asks for besides."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from rounding import metrics_of_runs
from runs_of_tests import ADAM, assert_same_run
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel
from torchmetrics import MeanMetric

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy

# Several passes a micro-batch and several micro-batches a step: gradients add up on the host.
POLICY = {**ADAM, "prompts_per_rollout": 4, "loss": GRPOLoss(kl_coef=0.02)}
POLICY |= {"sampler": Sampler(12), "max_tokens_per_micro_batch": 24}
ARGUMENTS = {"policy": POLICY, "accumulate_grad_batches": 2, "max_steps": 3}


class FSDP1OnTheHost(FSDP1Strategy):
    """Lets torch's FSDP1 offload where the device is the host, which has neither pinned memory nor streams to wait for, and do
    with gradients what it does on a device: those of a pass take the place of those that are there.
    """

    offloads = True

    def shard(self, model):
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
        torch.cpu.Stream.synchronize = lambda stream: None
        sharded = super().shard(model)
        units = [unit for unit in sharded.modules() if isinstance(unit, FullyShardedDataParallel)]
        assert units and all(unit.cpu_offload.offload_params for unit in units)
        return sharded

    def backward(self, *arguments, **options):
        for weight in self.lightning_module.parameters():
            weight.grad = None
        return super().backward(*arguments, **options)


OFFLOADING = {"fsdp2": partial(FSDP2Strategy, cpu_offload=True), "fsdp1": partial(FSDP1OnTheHost, cpu_offload=True)}


class Policies(Callback):
    """Makes sure that FSDP2 offloads at all."""

    def on_train_start(self, trainer, pl_module):
        parts = [module for module in pl_module.modules() if isinstance(module, FSDPModule)]
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        if isinstance(trainer.strategy, FSDP2Strategy):
            assert groups and all(type(group.offload_policy) is CPUOffloadPolicy for group in groups)


@pytest.fixture(scope="module")
def single(train_on):
    return train_on(1, {"run": ARGUMENTS})[0]["run"]


@pytest.fixture(scope="module")
def sharded(train_on, tmp_path_factory):
    """The runs of each rank; FSDP1 comes last, since it changes torch for its process."""
    root, jobs = tmp_path_factory.mktemp("offloaded"), {}
    fused = partial(torch.optim.AdamW, eps=1e-3, fused=True)  # which is what makes the host's step fast
    narrow = {"policy": {**ADAM, "optimizer": fused, "dtype": "bfloat16"}, "precision": "bf16-true", "max_steps": 2}
    jobs["narrow"], jobs["narrow, offloaded"] = ({**narrow, "strategy": make} for make in (FSDP2Strategy, OFFLOADING["fsdp2"]))
    for name, strategy in OFFLOADING.items():
        path, common = root / f"{name}.ckpt", {**ARGUMENTS, "strategy": strategy, "callbacks": (Policies(),)}
        jobs[name, "part"] = {**common, "max_steps": 1, "save": path}
        jobs[name, "rest"] = {**common, "ckpt_path": path}
    return train_on(2, jobs)


@pytest.mark.parametrize("strategy", OFFLOADING)
def test_it_is_the_run_of_one_process_and_goes_on_from_its_checkpoint(sharded, single, strategy):
    for rank in sharded:
        (first,), rest = rank[strategy, "part"]["steps"], rank[strategy, "rest"]
        assert first == pytest.approx(single["steps"][0], **metrics_of_runs()) and len(rest["steps"]) == 2
        assert_same_run(rest, single)


def test_weights_of_sixteen_bits_are_offloaded_too(sharded):
    for rank in sharded:
        plain, offloaded = (rank[name]["weights"] for name in ("narrow", "narrow, offloaded"))
        assert all(torch.equal(weight, offloaded[name]) for name, weight in plain.items())


def on(kind, strategy, backend=None):
    """A strategy as on the first device of a kind that is not here."""
    made = strategy(cpu_offload=True, process_group_backend=backend)
    made.parallel_devices = [torch.device(kind, 0) if kind != "cpu" else torch.device("cpu")]
    made.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    return made


def test_collectives_are_there_for_the_host_and_the_device_and_the_group_is_bound_to_none(monkeypatch):
    backends = {None: "cpu:gloo,cuda:nccl", "cuda:nccl,cpu:mpi": "cuda:nccl,cpu:mpi"}
    assert {name: on("cuda", FSDP2Strategy, name)._get_process_group_backend() for name in backends} == backends
    assert on("cpu", FSDP2Strategy)._get_process_group_backend() == "gloo"
    assert on("cuda", FSDP1Strategy)._get_process_group_backend() == "nccl", "FSDP1 gathers on the device alone"
    for strategy in (FSDP1Strategy, FSDP2Strategy):
        assert on("cuda", strategy).offloads and not on("cpu", strategy).offloads
    with pytest.raises(ConfigError, match=r"process_group_backend=nccl does not work with cpu_offload.*give cpu:gloo,cuda:nccl"):
        on("cuda", FSDP2Strategy, "nccl")._get_process_group_backend()
    group = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda strategy: None)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=group))
    for kind, bound in (("cpu", torch.device("cuda", 0)), ("cuda", None)):
        on(kind, FSDP2Strategy)._setup_distributed()
        assert group.bound_device_id == bound


def test_only_what_is_not_split_moves_to_the_device():
    strategy = on("meta", FSDP2Strategy)
    strategy.model = nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": MeanMetric()})
    strategy.model_to_device()
    assert strategy.model["linear"].weight.device.type == "cpu" and strategy.model["metric"].device.type == "meta"

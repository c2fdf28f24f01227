"""Policies of modules in memory."""

import pytest
import torch
from exported import logits
from lightning.pytorch import LightningModule
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hybrid_lightning.adapters.apply import parameter_groups, trainable_state
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_module, write_policy


class Holder(LightningModule):
    """What `HybridAdapterSetup` asks of a module, and nothing else."""

    adapter_attribute = "network"

    def __init__(self, network=None, plan=None, **arguments) -> None:
        super().__init__()
        self.save_hyperparameters(arguments)
        self.network, self.plan = network, plan


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    distributed.destroy_process_group()


def test_any_adaptable_module_that_names_its_base(train):
    trained = train()
    module = Holder(trained.model, trained.policy.plan, model=trained.policy.base.model, lr=0.5)
    policy = policy_of_module(module, steps=9, summary={"before": {}, "after": {"val/a": 1.0}, "validated_step": 9})
    assert policy.base == trained.policy.base and policy.weights.keys() == trained.policy.weights.keys()
    assert (policy.training.steps, policy.training.after, policy.training.arguments["lr"]) == (9, {"val/a": 1.0}, 0.5)


def test_writing_changes_neither_module_nor_random_state(train, tmp_path):
    trained = train()
    module = Holder(trained.model.train(), trained.policy.plan, model=trained.policy.base.model)
    before, state = {name: weight.clone() for name, weight in trainable_state(module.network).items()}, torch.get_rng_state()
    for number, form in enumerate((MergedModel(), AdapterFolder())):
        write_policy(policy_of_module(module), form, tmp_path / str(number))
    assert torch.equal(torch.get_rng_state(), state) and module.network.training
    assert all(torch.equal(weight, before[name]) for name, weight in trainable_state(module.network).items())


def test_shards_are_gathered(train, process_group):
    trained = train()
    expected = trained.policy.weights
    mesh = init_device_mesh("cpu", (1,))
    for name in {**parameter_groups(trained.model)[0], **parameter_groups(trained.model)[1]}:
        owner, _, attribute = name.rpartition(".")
        module = trained.model.get_submodule(owner)
        whole = getattr(module, attribute).detach()
        setattr(module, attribute, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
    module = Holder(trained.model, trained.policy.plan, model=trained.policy.base.model)
    policy = policy_of_module(module)
    assert not any(isinstance(weight, DTensor) for weight in policy.weights.values())
    assert all(torch.equal(policy.weights[name], weight) for name, weight in expected.items())
    assert policy_of_module(module, keep=False) is None


def test_what_cannot_be_exported_says_why(train):
    with pytest.raises(ConfigError, match="has no adapter, so nothing was trained; give ckpt_path, or fit first"):
        policy_of_module(Holder(model="x"))
    trained = train()
    assert logits(trained.model) is not None
    with pytest.raises(ConfigError, match="does not say which base model it loaded; it needs a hyper-parameter 'model'"):
        policy_of_module(Holder(trained.model, trained.policy.plan))

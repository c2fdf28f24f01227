"""Policies of checkpoints and of modules in memory; `sharding/test_checkpoints_cross` has the sharded ones."""

import pytest
import torch
from lightning.pytorch import LightningModule

from hybrid_lightning.adapters.apply import trainable_state
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.export import policy_of_checkpoint, policy_of_module
from hybrid_lightning.training.checkpoint import CHECKPOINT_KEY, new_state


def content_of(trained, **changes):
    state = {f"model.{name}": weight for name, weight in trainable_state(trained.model).items()}
    return {
        "state_dict": state,
        "global_step": 7,
        "hyper_parameters": {"model": trained.policy.base.model, "revision": None, "dtype": "float32", "lr_lora": 0.5, "_x": 1},
        "callbacks": {"RunSummary": {"before": {"val/a": 0.1}, "after": {"val/a": 0.9}, "validated_step": 6, "seconds": 1.0}},
        CHECKPOINT_KEY: {**new_state(trained.policy.plan, "x"), "keep_start_weights": True},
        **changes,
    }


def assert_same(policy, trained):
    assert policy.plan == trained.policy.plan and policy.base.source == trained.policy.base.source
    assert policy.weights.keys() == trained.policy.weights.keys()
    assert all(torch.equal(policy.weights[name], weight) for name, weight in trained.policy.weights.items())


def test_plan_weights_and_what_the_card_says(train, tmp_path):
    trained, path = train(share=0.3), tmp_path / "last.ckpt"
    torch.save(content_of(trained), path)
    policy = policy_of_checkpoint(path)
    assert_same(policy, trained)
    assert policy_of_checkpoint(path, {"model": "moved"}).base.model == "moved"
    training = policy.training
    assert (training.steps, training.validated_step, training.before, training.after) == (7, 6, {"val/a": 0.1}, {"val/a": 0.9})
    assert training.arguments["lr_lora"] == 0.5 and "_x" not in training.arguments


def test_whatever_is_not_a_whole_checkpoint_of_ours_is_refused(train, tmp_path):
    content = content_of(train())
    state, path = content["state_dict"], tmp_path / "last.ckpt"
    lacking = {name: weight for name, weight in state.items() if "model.layers.1.mlp.up_proj.lora_A" not in name}
    stray = "model.base_model.model.elsewhere.lora_A.default.weight"

    def save(**changes):
        torch.save({**content, **changes}, path)

    for write, message in (
        (lambda: path.write_text("text"), "cannot be read"),
        (lambda: torch.save([1], path), "is not a checkpoint, but a list"),
        (lambda: torch.save({"state_dict": {}}, path), "not written by hybrid_lightning"),
        (lambda: save(**{CHECKPOINT_KEY: new_state(None, "x")}), "saved without an adapter"),
        (lambda: save(hyper_parameters={}), "does not name its base model"),
        (lambda: save(state_dict=lacking), "does not have the trained weight '.*up_proj.lora_A.weight'"),
        (lambda: save(state_dict=state | {stray: torch.zeros(2, 2)}), "has, against its plan, the trained weight 'base"),
    ):
        write()
        with pytest.raises((CheckpointError, ConfigError), match=message):
            policy_of_checkpoint(path)


# ---- modules in memory


class Holder(LightningModule):
    """What `HybridAdapterSetup` asks of a module, and nothing else."""

    adapter_attribute = "network"

    def __init__(self, network=None, plan=None, **arguments) -> None:
        super().__init__()
        self.save_hyperparameters(arguments)
        self.network, self.plan = network, plan


def test_any_adaptable_module_that_names_its_base(train):
    trained = train()
    module = Holder(trained.model, trained.policy.plan, model=trained.policy.base.model, lr=0.5)
    policy = policy_of_module(module, steps=9, summary={"before": {}, "after": {"val/a": 1.0}, "validated_step": 9})
    assert policy_of_module(module, keep=False) is None
    assert policy.base.source == trained.policy.base.source and policy.weights.keys() == trained.policy.weights.keys()
    assert (policy.training.steps, policy.training.after, policy.training.arguments["lr"]) == (9, {"val/a": 1.0}, 0.5)


def test_what_cannot_be_exported_says_why(train):
    with pytest.raises(ConfigError, match="has no adapter, so nothing was trained; give ckpt_path, or call fit first"):
        policy_of_module(Holder(model="x"))
    trained = train()
    with pytest.raises(ConfigError, match="does not name its base model; give it a hyper-parameter 'model'"):
        policy_of_module(Holder(trained.model, trained.policy.plan))

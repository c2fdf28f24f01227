"""What a job of two processes exports while it runs, and what one process exports of its checkpoint."""

import torch
from ranks_of_tests import run
from rounding import assert_same_logits
from runs_of_tests import train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_lightning.callbacks import PolicyExport
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

IDS = torch.tensor([[4, 5, 13, 6, 16]])


def train_and_export(root, **arguments):
    exports = (PolicyExport(MergedModel("float32"), str(root / "live"), every_n_steps=1),)
    return train(root=root / "run", callbacks=exports, save=root / "last.ckpt", **arguments)


def test_a_split_model_is_exported_whole(folder, tmp_path):
    arguments = {"folder": folder, "strategy": FSDP2Strategy, "devices": 2, "max_steps": 2}
    run(2, tmp_path / "ranks", train_and_export, root=tmp_path, **arguments)
    assert sorted(path.name for path in (tmp_path / "live").iterdir()) == ["step=1", "step=2"]
    policy = policy_of_checkpoint(tmp_path / "last.ckpt")
    write_policy(policy, MergedModel("float32"), tmp_path / "saved")
    live, saved = (load_file(path / "model.safetensors") for path in (tmp_path / "live" / "step=2", tmp_path / "saved"))
    assert live.keys() == saved.keys() and all(torch.equal(live[name], saved[name]) for name in live)
    trained = PolicyModule.load_from_checkpoint(tmp_path / "last.ckpt").model.eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "live" / "step=2")
    with torch.no_grad():
        assert_same_logits(exported(IDS).logits, trained(IDS).logits)
    write_policy(policy, AdapterFolder(), tmp_path / "adapter")
    state = trained.state_dict()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in policy.plan.full_modules:
        full = state[f"base_model.model.{name}.modules_to_save.default.weight"]
        assert torch.equal(adapter[f"base_model.model.{name}.weight"], full)

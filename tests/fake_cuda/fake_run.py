"""Optimizer steps of a `FakeModel`, by the objects of a run."""

import tempfile

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_runs import Constant

from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training import PolicyModule


class _Device(SingleDeviceStrategy):
    """One on which the model lies already, and stays."""

    def __init__(self, device):
        super().__init__(device, accelerator=type("Any", (CPUAccelerator,), {"setup_device": lambda self, device: None})())

    def model_to_device(self):
        pass

    def teardown(self):
        pass


def policy_of(fake, most, **loss):
    """A run's module with GSPO and a KL term, whose passes take that many tokens; None for as many as fit."""
    module = PolicyModule(GSPOLoss(kl_coef=0.01, **loss), Constant(), dtype="bfloat16", max_tokens_per_micro_batch=most)
    policy = module.policy
    policy._model, policy._runner, policy._base_digest, policy.plan = fake.model, fake.runner, "fake", fake.plan
    policy._on_model(fake.model)
    return module


def fit(module, fake, batch, steps, callback):
    """Optimizer steps with this micro-batch, and clipping."""
    loader = type("Loader", (), {"__iter__": lambda self: iter(steps * [batch]), "__len__": lambda self: steps})()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"precision": "bf16-mixed", "max_steps": steps, "gradient_clip_val": 1.0, "default_root_dir": folder, **quiet}
        Trainer(strategy=_Device(fake.device), callbacks=[callback], **flags).fit(module, train_dataloaders=loader)

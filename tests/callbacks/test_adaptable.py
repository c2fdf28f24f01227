"""A LightningModule that knows nothing of policies, but has the two names of the protocol, is adapted, trained and resumed."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from tiny_models import build_model
from tiny_runs import build_adapter, build_trainer
from torch.utils.data import DataLoader

from hybrid_lightning.adapters import AdapterPlan, ModuleBudget
from hybrid_lightning.callbacks import Adaptable, HybridAdapterSetup
from hybrid_lightning.errors import ConfigError, PlanError
from hybrid_lightning.trainer import Trainer

torch.manual_seed(0)
DATA = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(0))


class Losses:
    """Those of some batches, as often as they are asked for."""

    def __init__(self, module, batches):
        self.module, self.batches = module, batches

    def __iter__(self):
        return map(self.module.loss, self.batches)


class Supervised(LightningModule):
    """Next-token prediction."""

    adapter_attribute = "network"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = build_model("llama", seed=seed, std=0.1)
        self.scored = 0

    def calibration_losses(self, num_prompts):
        self.scored += 1
        self.asked = num_prompts
        return Losses(self, DATA[:num_prompts].split(2))

    def loss(self, batch):
        return self.network(batch, labels=batch).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self):
        return DataLoader(DATA, batch_size=4)

    val_dataloader = train_dataloader


class NothingToAdapt(Supervised):
    calibration_losses = None


def logits(module):
    return module.eval().network(DATA).logits


def trained(root, adapter=None, steps=4, trainer=None, module=None):
    torch.manual_seed(1)
    module = module or Supervised()
    trainer = trainer or build_trainer(root, adapter or build_adapter(), max_steps=steps)
    trainer.fit(module)
    return module, trainer


def test_it_is_adapted_and_learns(tmp_path):
    assert isinstance(Supervised(), Adaptable)
    before = float(Supervised().loss(DATA))
    module, _ = trained(tmp_path, HybridAdapterSetup(budget=ModuleBudget(0.2), rank=2), steps=12)
    assert float(module.loss(DATA)) < before - 0.3
    assert len(module.plan.full_modules) == 3 and module.plan.scorer["class_path"].endswith("PreconditionedTail")
    assert module.asked is None and module.plan.calibration == {"prompts": None}, "it chooses how much it is scored on"
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable == module.plan.trainable_parameters()
    assert AdapterPlan.load(tmp_path / "version_0" / "plan.json") == module.plan


@pytest.mark.parametrize("kind", [Trainer, LightningTrainer])
def test_a_run_that_is_resumed_ends_like_one_that_was_not_stopped(tmp_path, kind):
    def trainer(steps):
        return build_trainer(tmp_path, build_adapter(), max_steps=steps, kind=kind)

    whole, _ = trained(tmp_path, trainer=trainer(8))
    _, stopped = trained(tmp_path, trainer=trainer(4))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    torch.manual_seed(99)
    resumed = Supervised()
    trainer(8).fit(resumed, ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.plan == whole.plan and torch.equal(logits(resumed), logits(whole))
    assert resumed.scored == (kind is LightningTrainer), "Lightning's own Trainer tells the checkpoint too late"


def test_a_checkpoint_is_evaluated_with_its_plan_which_other_weights_refuse(tmp_path):
    module, trainer = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Supervised()
    (metrics,) = build_trainer(tmp_path, build_adapter()).validate(fresh, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert fresh.plan == module.plan and fresh.scored == 0
    assert metrics["val_loss"] == pytest.approx(float(module.eval().loss(DATA)), rel=1e-5)
    with pytest.raises(PlanError, match="with other weights"):
        trained(tmp_path, HybridAdapterSetup(plan=str(tmp_path / "version_0" / "plan.json")), module=Supervised(seed=1))


def test_a_module_without_the_two_names_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot adapt NothingToAdapt; give it an attribute adapter_attribute"):
        build_trainer(tmp_path, build_adapter()).fit(NothingToAdapt())
    module = Supervised()
    module.adapter_attribute = "model"
    with pytest.raises(ConfigError, match=r"Supervised\.adapter_attribute is 'model', but there is no such module"):
        build_trainer(tmp_path, build_adapter()).fit(module)

"""Plans that a run makes: against scores recomputed from full gradients, and from the settings of the run."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny_models import build_model, plain_logprobs
from tiny_runs import Constant, DigitShare, build_adapter, build_data, build_policy, build_trainer, fit
from torch.utils.data import DataLoader

from hybrid_lightning.adapters import AdapterPlan, ModuleBudget, ParameterBudget, scorers
from hybrid_lightning.callbacks import Adaptable, HybridAdapterSetup, StepTimer
from hybrid_lightning.errors import ConfigError, PlanError
from hybrid_lightning.rollout.batching import join_rollouts
from hybrid_lightning.trainer import Trainer

KINDS = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]
NAMES = {f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS}


def planned(model, sums, root, adapter, **policy):
    return fit(model, sums, root, adapter, policy=policy, max_steps=0).plan


def full_gradients(rollout):
    """Of the policy objective in float64: name -> gradient."""
    base = build_model("llama", std=0.1).double().requires_grad_(True)
    rewards = torch.tensor(DigitShare()(rollout.completions, None), dtype=torch.float64).view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert len(advantages) == 48
    rows = range(len(advantages))
    (-sum(advantages[row] * plain_logprobs(base, rollout.sequences, row).mean() for row in rows) / len(rows)).backward()
    return {name: module.weight.grad for name, module in base.named_modules() if name in NAMES}


def test_the_plan_equals_an_independent_singular_value_decomposition(model, sums, tmp_path):
    policy, rollouts = build_policy(model), []
    generate = policy.task.generation.generate
    policy.task.generation.generate = lambda *args, **kwargs: rollouts.append(generate(*args, **kwargs)) or rollouts[-1]
    adapter = build_adapter(calibration_prompts=12, scorer=scorers.PreconditionedTail())
    build_trainer(tmp_path, adapter, max_steps=0).fit(policy, datamodule=build_data(sums))
    plan = policy.plan

    def tail_of_adams_step(gradient):
        squares = gradient.square()
        second_moment = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
        return float(torch.linalg.svdvals(gradient / second_moment.sqrt())[2:].square().sum())

    expected = {name: tail_of_adams_step(matrix) for name, matrix in full_gradients(join_rollouts(rollouts)).items()}
    assert {module.name: module.score for module in plan.candidates} == pytest.approx(expected, rel=1e-3)
    best = sorted(expected, key=lambda name: -expected[name])[:3]
    assert set(plan.full_modules) == set(best) and set(plan.lora_modules) == NAMES - set(best)
    assert plan.scorer["class_path"].endswith("PreconditionedTail") and plan.calibration["signal"] == "reward"


def test_settings_reach_the_plan_and_ranks_by_a_pattern_the_model(model, sums, tmp_path, capsys):
    settings = {"rank": 3, "alpha": 5.0, "dropout": 0.1, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    pattern = {"mlp": 3, "attention": 1, "o_proj": 0}
    adapter = HybridAdapterSetup(ParameterBudget(0.5), rank_pattern=pattern, calibration_prompts=3, **settings)
    policy = fit(model, sums, tmp_path, adapter, max_steps=0)
    plan = policy.plan
    assert {module.name.rsplit(".", 1)[1] for module in plan.candidates} == set(settings["target_modules"])
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.dropout) == (3, 5.0, 0.1)
    assert plan.budget == {"class_path": "hybrid_lightning.adapters.ParameterBudget", "init_args": {"share": 0.5}}
    assert (plan.model, plan.revision, plan.seed, plan.calibration["prompts"]) == (str(model), None, 0, 3)
    frozen = {module.name for module in plan.candidates if module.mode == "frozen"}
    assert frozen == {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)} - set(plan.full_modules)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == plan.trainable_parameters()
    assert "LoRA of rank" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "full"), [(0.0, 0), (1.0, 14)])
def test_the_ends_of_the_line_need_no_rollouts(model, sums, tmp_path, share, full):
    policy = fit(model, sums, tmp_path, build_adapter(share), policy={"reward": Constant()}, max_steps=0)
    assert len(policy.plan.full_modules) == full and len(policy.plan.lora_modules) == 14 - full
    assert policy.plan.scorer is None and all(module.score is None for module in policy.plan.candidates)
    assert policy.task.last_calibration is None and [path.name for path in (tmp_path / "version_0").iterdir()] == ["plan.json"]


def test_a_plan_from_answers_says_so_and_is_of_as_many_prompts_as_a_rollout_has(model, sums, tmp_path, capsys):
    plan = planned(model, sums, tmp_path, build_adapter(calibration_prompts=None), reward=Constant(), prompts_per_rollout=3)
    assert plan.calibration == {"signal": "answers", "sequences": 3, "useful_sequences": 3, "prompts": 3}
    assert "All calibration rewards of each prompt are equal" in capsys.readouterr().out


# ---- a module that knows nothing of policies, but has the two names of the protocol

DATA = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(0))


class Supervised(LightningModule):
    """Next-token prediction."""

    adapter_attribute = "network"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = build_model("llama", seed=seed, std=0.1)
        self.asked = []

    def calibration_losses(self, num_prompts):
        self.asked.append(num_prompts)
        return map(self.loss, DATA[:num_prompts].split(2))

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


def trained(root, *callbacks, ckpt=None, module=None, **flags):
    torch.manual_seed(1)
    module = module or Supervised()
    trainer = build_trainer(root, *(callbacks or [build_adapter()]), **{"max_steps": 4, **flags})
    trainer.fit(module, ckpt_path=ckpt)
    return module, trainer


def test_it_is_adapted_and_learns(tmp_path):
    assert isinstance(Supervised(), Adaptable)
    before = float(Supervised().loss(DATA))
    timer = StepTimer()
    module, _ = trained(tmp_path, timer, HybridAdapterSetup(budget=ModuleBudget(0.2), rank=2), max_steps=12)
    seconds = timer.totals()
    assert min(seconds["update"], seconds["scoring"]) > 0 == seconds["generate"] and timer.rates() == {}
    assert float(module.loss(DATA)) < before - 0.3
    assert len(module.plan.full_modules) == 3 and module.plan.scorer["class_path"].endswith("PreconditionedTail")
    assert module.asked == [None] and module.plan.calibration == {"prompts": None}, "it chooses how much it is scored on"
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable == module.plan.trainable_parameters()
    assert AdapterPlan.load(tmp_path / "version_0" / "plan.json") == module.plan


@pytest.mark.parametrize("kind", [Trainer, LightningTrainer])
def test_a_checkpoint_is_resumed_as_if_there_was_no_stop_and_evaluated_with_its_plan(tmp_path, kind):
    whole, _ = trained(tmp_path, max_steps=8, kind=kind)
    module, stopped = trained(tmp_path, kind=kind)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = trained(tmp_path, ckpt=tmp_path / "stopped.ckpt", max_steps=8, kind=kind)
    assert resumed.plan == whole.plan
    assert torch.equal(resumed.eval().network(DATA).logits, whole.eval().network(DATA).logits)
    assert bool(resumed.asked) == (kind is LightningTrainer), "Lightning's own Trainer tells the checkpoint too late"
    fresh = Supervised()
    (metrics,) = build_trainer(tmp_path, build_adapter()).validate(fresh, ckpt_path=tmp_path / "stopped.ckpt", verbose=False)
    assert fresh.plan == module.plan and not fresh.asked
    assert metrics["val_loss"] == pytest.approx(float(module.eval().loss(DATA)), rel=1e-5)


def test_other_weights_and_a_module_without_the_two_names_are_refused(tmp_path):
    trained(tmp_path, max_steps=0)[0].plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="with other weights"):
        trained(tmp_path, HybridAdapterSetup(plan=str(tmp_path / "plan.json")), module=Supervised(seed=1))
    with pytest.raises(ConfigError, match="cannot adapt BoringModel; give it an attribute adapter_attribute"):
        build_trainer(tmp_path, build_adapter()).fit(BoringModel())

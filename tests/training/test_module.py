"""A module is made without its model, which is loaded when it is asked for; and how a step moves and computes."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import Log, build_adapter, build_data, build_policy, build_trainer, fit, trained, write_model
from torch.utils.data import DataLoader

from hybrid_lightning.adapters import Random
from hybrid_lightning.errors import ConfigError, DataError, ModelError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rewards import ExactMatch
from hybrid_lightning.training import PolicyModule
from hybrid_lightning.training.rl_task import RLTask
from hybrid_lightning.types import Prompt


class Widened(PolicyModule):
    """Looks at its model while it is made, as a user's may."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.width = self.model.config.hidden_size


def make(model, kind=PolicyModule, **arguments):
    return kind(GRPOLoss(), ExactMatch(), model=str(model), **arguments)


def test_weights_are_loaded_once_when_they_are_first_needed_and_are_part_of_the_module_then(model):
    module = make(model)
    assert not module.policy.is_loaded and not module.state_dict()
    first = module.model
    assert module.policy.is_loaded and module.state_dict() and next(module.parameters()) is next(first.parameters())
    module.policy.load()
    assert module.model is first, "once"
    assert make(model, Widened).width == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "half"}, "model.dtype must be one of"),
        ({"lr_lora": float("nan")}, r"model\.lr_lora must be a non-negative number, got nan"),
        ({"eval_samples": 0}, r"model\.eval_samples must be at least 1, got 0"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked_before_weights_are_loaded(model, monkeypatch, arguments, message):
    monkeypatch.setattr("hybrid_lightning.model.pretrained.load_model", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises((ConfigError, ModelError), match=message):
        make(model, **arguments)


def test_settings_are_checked_once_a_run_which_may_be_before_the_model_is_loaded(model, sums, tmp_path, monkeypatch):
    checked, check = [], RLTask.check
    monkeypatch.setattr(RLTask, "check", lambda self: checked.append(self.run.stage) or check(self))
    expected = fit(model, sums, tmp_path)
    build_trainer(tmp_path).validate(expected, datamodule=build_data(sums, validation_fraction=0.25), verbose=False)
    assert checked == ["fit", "validate"], "in a fit before modules are scored, and not again"
    torch.manual_seed(11)
    trainer, data = build_trainer(tmp_path, build_adapter(scorer=Random())), build_data(sums)
    module = build_policy(model)
    trainer.check(module, data)
    assert not module.policy.is_loaded
    module.policy.load()
    trainer.fit(module, datamodule=data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in expected.state_dict().items())


def test_each_learning_rate_moves_its_own_parameters_and_gradient_clipping_limits_the_step(model, sums, tmp_path):
    def step(lr_full, lr_lora, *callbacks, **flags):
        start, policy = {}, {"optimizer": torch.optim.SGD, "lr_full": lr_full, "lr_lora": lr_lora}
        noted = LambdaCallback(on_train_start=lambda _, module: start.update(trained(module)))
        after = trained(fit(model, sums, tmp_path, noted, *callbacks, policy=policy, max_steps=1, **flags))
        return {name: after[name] - start[name] for name in after}

    once, twice = step(0.05, 0.1), step(0.05, 0.2)
    full = {name for name in once if "modules_to_save" in name}
    assert 0 < len(full) < len(once)
    for name in once:
        torch.testing.assert_close(twice[name], once[name] * (1 if name in full else 2), atol=1e-7, rtol=1e-4, msg=name)
    assert all(bool(once[name].any()) for name in once if "lora_A" not in name), "B is zero, so A has no gradient yet"
    watch = Log()
    clipped = step(1.0, 1.0, watch, gradient_clip_val=0.01)
    length = torch.stack([moved.norm() for moved in clipped.values()]).norm()
    assert float(length) == pytest.approx(0.01, rel=1e-3)
    assert watch.metrics[0]["grad_norm/full"] > 0.05, "the logged norm is the one before clipping"


def test_dropout_of_the_base_stays_off_and_dropout_of_lora_is_on(tmp_path, sums):
    """GPT-2 has dropout of its own, with which the first minibatch would not be on-policy, also in checkpointed blocks."""
    model = write_model(tmp_path / "gpt2", "gpt2")
    ratios = []
    for dropout in (0.0, 0.5):
        watch = Log()
        policy = {"epochs_per_rollout": 2, "gradient_checkpointing": True, "lr_lora": 0.1}
        fit(model, sums, tmp_path, watch, build_adapter(0, dropout=dropout), policy=policy, max_steps=3)
        ratios.append([step["ratio/max"] for step in watch.metrics])
    assert ratios[0][0] == ratios[0][2] == pytest.approx(1, abs=1e-5)
    assert ratios[1][2] > 1.01, "from the third step on B is not zero, so that LoRA's dropout shows"


class Own(LightningDataModule):
    """Prompts in loaders of one's own, each of them right or a DataLoader as for other data."""

    def __init__(self, *ordinary):
        super().__init__()
        self.ordinary = ordinary

    def setup(self, stage):
        self.prompts = [Prompt(text=f"{n}+1=", answer=str(n + 1), index=n * ("index" not in self.ordinary)) for n in range(8)]

    def train_dataloader(self):
        if "train" in self.ordinary:
            return DataLoader(self.prompts, batch_size=4, collate_fn=list)
        return self.trainer.lightning_module.rollout_loader(self.prompts)

    def val_dataloader(self):
        return DataLoader(self.prompts[:4], batch_size=4, collate_fn=None if "validation" in self.ordinary else list)


def test_a_data_module_of_ones_own_trains_or_is_refused_with_the_lines_to_write_before_modules_are_scored(
    model, tmp_path, monkeypatch
):
    watch = Log()
    policy = fit(model, None, tmp_path, build_adapter(), watch, data=Own(), num_sanity_val_steps=-1, max_steps=1)
    assert {prompt.text for prompt in watch.batches[0].rollout.prompts} <= {f"{n}+1=" for n in range(8)}
    assert policy.evaluation.last[""]["problems"] == 4
    with pytest.raises(DataError, match=r"two prompts to evaluate have index=0 and would count as one; give each its own"):
        fit(model, None, tmp_path, data=Own("index"), num_sanity_val_steps=-1)
    monkeypatch.setattr(RLTask, "calibration_losses", lambda *_: pytest.fail("modules are scored"))
    lines = (
        r".* `return self\.trainer\.lightning_module\.rollout_loader\(prompts\)`|.*def val_dataloader\(self\): return DataLoader"
    )
    for ordinary, message in (
        (("train",), r"Own\.train_dataloader returns prompts, but the policy trains on rollouts"),
        (("validation",), r"Own\.val_dataloader collates its batches"),
    ):
        with pytest.raises(ConfigError, match=message + lines):
            fit(model, None, tmp_path, build_adapter(), data=Own(*ordinary))
    loader, policy = DataLoader([Prompt(text="1+1=")], collate_fn=list), build_policy(model)
    with pytest.raises(ConfigError, match=r"trainer\.datamodule has none; give trainer\.fit\(policy, datamodule"):
        build_trainer(tmp_path, build_adapter()).fit(policy, train_dataloaders=loader)
    with pytest.raises(ConfigError, match=r"the train dataloader returned a list, not a batch of rollouts"):
        build_trainer(tmp_path, build_adapter(scorer=Random())).fit(build_policy(model), train_dataloaders=loader)

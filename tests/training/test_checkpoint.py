"""A policy made in Python comes back from its checkpoint alone, parts of the user's own included."""

import re
from argparse import ArgumentError
from functools import partial
from operator import attrgetter

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import DigitShare, build_adapter, build_data, build_policy, build_trainer, check, fit, write_model

from hybrid_lightning.adapters.budgets import config_with_defaults
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.export.sources import policy_of_checkpoint
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.rewards import FormatReward, WeightedSum
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.training import LinearSchedule, PolicyModule
from hybrid_lightning.training.checkpoint import CHECKPOINT_KEY
from hybrid_lightning.types import Prompt

IDS = torch.tensor([[4, 5, 13, 6, 16]])


class LengthPenalty(DigitShare):
    """A reward of one's own."""

    def __init__(self, per_character: float = 0.1) -> None:
        self.per_character = per_character

    def __call__(self, completions, prompts):
        return [-self.per_character * len(text) for text in completions]


class Patient(PolicyModule):
    """A module of one's own, with an argument more."""

    def __init__(self, patience: int, **arguments) -> None:
        super().__init__(**arguments)
        self.patience = patience


def save(model, sums, root, *callbacks, policy=None):
    saver = ModelCheckpoint(root, filename="last", every_n_train_steps=2)
    module = fit(model, sums, root, *callbacks, saver, policy=policy, enable_checkpointing=True)
    return module.eval(), root / "last.ckpt"


def assert_same_policy(loaded, module):
    loaded.eval()
    assert loaded.plan == module.plan
    assert torch.equal(loaded.model(IDS).logits, module.model(IDS).logits)


def test_a_module_and_parts_of_ones_own_come_back_with_their_arguments(model, sums, tmp_path):
    reward = WeightedSum([DigitShare(), LengthPenalty(per_character=0.25), FormatReward("[0-9]", name="digit")], [1.0, 0.5, 0.1])
    policy = {"loss": GSPOLoss(kl_coef=0.01), "reward": reward, "sampler": Sampler(6, temperature=0.7, stop=["#"])}
    policy |= {"correction": TokenTruncation(cap=3.0), "schedule": LinearSchedule(1, final_factor=0.5)}
    policy |= {"optimizer": partial(torch.optim.AdamW, betas=(0.8, 0.9)), "kind": partial(Patient, 7)}
    module, path = save(model, sums, tmp_path, policy=policy)
    loaded = Patient.load_from_checkpoint(path)
    assert loaded.patience == 7
    assert_same_policy(loaded, module)
    parts = ("task.loss", "task.reward", "task.generation.sampler", "task.options.correction", "optimization.schedule")
    for part in parts:
        assert config_with_defaults(attrgetter(part)(loaded)) == config_with_defaults(attrgetter(part)(module))
    terms, expected = ([(type(term), weight) for term, weight in each.terms()] for each in (loaded.task.reward, reward))
    assert terms == expected
    assert loaded.rates == module.rates and loaded.task.schedule == module.task.schedule
    assert loaded.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    "adapter",
    [{"share": 0.0, "use_dora": True, "dropout": 0.1}, {"share": 1.0}, {"use_rslora": True, "keep_start_weights": False}],
    ids=str,
)
def test_every_kind_of_adapter_comes_back(model, sums, tmp_path, adapter):
    module, path = save(model, sums, tmp_path, build_adapter(**adapter))
    loaded = PolicyModule.load_from_checkpoint(path)
    assert_same_policy(loaded, module)
    assert loaded.policy.keep_start_weights == module.policy.keep_start_weights
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert content[CHECKPOINT_KEY]["plan"]["digest"] == module.plan.digest


def test_what_cannot_be_written_is_refused_at_once(model):
    class Local(DigitShare):
        pass

    for optimizer in (lambda parameters: torch.optim.SGD(parameters, lr=1), torch.optim.SGD.__init__):
        with pytest.raises(ConfigError, match=r"optimizer=.* cannot be written into a checkpoint; give a class, functools"):
            build_policy(model, optimizer=optimizer)
    for reward in (Local(), WeightedSum([DigitShare(), Local()])):
        with pytest.raises(ConfigError, match=r"reward: the class .*Local cannot be written .* define it at the top level"):
            build_policy(model, reward=reward)


def test_a_reward_that_no_other_program_finds_is_named_at_the_start_and_left_out_when_loading(model, sums, tmp_path, monkeypatch):
    def by_length(completions, answer, **columns):
        return [float(len(text) > 3) for text in completions]

    monkeypatch.setattr(LengthPenalty, "__module__", "__main__")  # of a script
    given = [by_length, partial(by_length, tolerance=1), LengthPenalty()]
    with pytest.warns(UserWarning) as said:
        module, path = save(model, sums, tmp_path, policy={"reward": given})
    (named,) = (str(warning.message) for warning in said if "checkpoints store" in str(warning.message))
    assert "<locals>.by_length, functools.<partial>, __main__.LengthPenalty of model.reward only by name" in named
    assert [term.name for term in module.task.generation.reward_terms()] == ["by_length", "function_reward", "length_penalty"]

    with pytest.warns(UserWarning) as said:
        loaded = PolicyModule.load_from_checkpoint(path)
    (left_out,) = (str(warning.message) for warning in said if "reward" in str(warning.message))
    assert re.search(
        r"without it: module '__main__' has no attribute '\w+'; .* call load_from_checkpoint\(path, reward=\.\.\.\)", left_out
    )
    assert "\n" not in left_out and len(left_out) < 350
    assert_same_policy(loaded, module)
    prompt = Prompt(text="1+1=", index=1)
    assert len(loaded.generate([prompt], samples_per_prompt=2).completions) == 2
    policy_of_checkpoint(path)  # what an export reads
    data = build_data(sums, test_fraction=0.5)
    (tested,) = build_trainer(tmp_path).test(loaded, datamodule=data, verbose=False)
    (full,) = build_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    names = ["test/problems", "test/completion_length", "test/truncation_rate"]
    assert tested == {name: full[name] for name in names} and full["test/greedy_reward"] >= 0
    for stage in ("fit", "predict"):
        with pytest.raises(ConfigError, match=r"model\.reward is missing"):
            check(loaded, tmp_path, stage)
    again = PolicyModule.load_from_checkpoint(path, reward=by_length)
    assert again.task.reward.name == "by_length"

    with pytest.raises(ArgumentError, match="No module named 'nowhere'"):  # and nothing else is left out
        PolicyModule.load_from_checkpoint(path, loss={"class_path": "nowhere.Loss"})


def test_arguments_can_be_replaced_while_loading_but_no_other_base_model_or_weights(model, sums, tmp_path):
    module, path = save(model, sums, tmp_path)
    loaded = PolicyModule.load_from_checkpoint(path, reward=LengthPenalty(), eval_samples=3)
    assert_same_policy(loaded, module)
    assert isinstance(loaded.task.reward, LengthPenalty) and loaded.task.evaluation.samples == 3
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"belongs to a base model with digest .* give the model\.model"):
        PolicyModule.load_from_checkpoint(path, model=str(other))
    with pytest.raises(CheckpointError, match=r"model\.dtype of the run's config\.yaml"):
        PolicyModule.load_from_checkpoint(path, dtype="bfloat16")
    content = torch.load(path, weights_only=True)
    first, *others = weights = content["state_dict"]
    for changed, message in (
        ({name: weights[name] for name in others}, "no values for 1 trainable weights, such as"),
        ({**weights, "extra": weights[first]}, "1 weights that this model does not have, such as 'extra'"),
    ):
        torch.save({**content, "state_dict": changed}, tmp_path / "changed.ckpt")
        with pytest.raises(CheckpointError, match=message):
            PolicyModule.load_from_checkpoint(tmp_path / "changed.ckpt")

"""A module that is made without its model, and loads it when that is asked for."""

import inspect
from operator import attrgetter

import pytest
import torch
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, write_model
from transformers import T5Config

from hybrid_lightning.adapters import Random
from hybrid_lightning.advantages import LeaveOneOutAdvantage
from hybrid_lightning.data import FileSource
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.policy import ExampleModule, PolicyModule, SupervisedModule
from hybrid_lightning.rewards import ExactMatch, OverlongPenalty, WeightedSum
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling


class Widened(PolicyModule):
    """Looks at its model while it is made, as a user's may."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.width = self.model.config.hidden_size


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("hybrid_lightning.policy.pretrained.load_model", fail)


def unloaded(model, kind=PolicyModule, **arguments):
    return kind.unloaded(GRPOLoss(), ExactMatch(), model=str(model), **arguments)


def test_what_is_loaded_later_is_the_same_module_and_a_constructor_that_looks_at_it_has_it_loaded(model):
    module, expected = unloaded(model), PolicyModule(GRPOLoss(), ExactMatch(), model=str(model))
    assert not module.is_loaded and expected.is_loaded and dict(module.hparams) == dict(expected.hparams)
    module.load()
    assert module.is_loaded and module.state_dict().keys() == expected.state_dict().keys()
    for name in ("base_parameters", "pretrained.stop_ids", "base_digest"):
        assert attrgetter(name)(module) == attrgetter(name)(expected)
    first = module.model
    module.load()
    assert module.model is first, "once"
    module = unloaded(model, Widened)
    assert module.width == 32 and module.is_loaded


def test_stop_tokens_are_those_that_the_model_will_have(tmp_path):
    write_model(tmp_path / "ends")
    (tmp_path / "ends" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "ends" / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "ends" / "model.safetensors").write_bytes(b"not read")
    module = SupervisedModule.unloaded(model=str(tmp_path / "ends"))
    assert module.pretrained.stop_ids == [2, 7]
    (tmp_path / "weights").replace(tmp_path / "ends" / "model.safetensors")
    module.load()
    assert module.pretrained.stop_ids == [2, 7]


def test_that_there_is_such_a_model_is_found_out_before_its_data_is_read(sums, tmp_path, monkeypatch):
    monkeypatch.setattr(FileSource, "read_tables", lambda self: pytest.fail("the data is read"))
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"not read")
    module = PolicyModule.unloaded(GRPOLoss(), ExactMatch(), model=str(tmp_path / "t5"))
    with pytest.raises(ModelError, match="no causal language model"):
        build_trainer(tmp_path).check(module, build_data(sums))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "half"}, "model.dtype must be one of"),
        ({"revision": "main"}, "is for hub models"),
        ({"lr_lora": float("nan")}, r"model\.lr_lora must be a non-negative number, got nan"),
        ({"eval_samples": 0}, r"model\.eval_samples must be at least 1, got 0"),
        ({"samples_per_prompt": 0}, r"model\.samples_per_prompt must be at least 1, got 0"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be at least 1, got 0"),
        ({"samples_per_prompt": 1, "dynamic_sampling": DynamicSampling()}, "looks for prompts whose completions differ"),
    ],
)
def test_arguments_are_checked_at_once(model, no_weights, arguments, message):
    with pytest.raises((ConfigError, ModelError), match=message):
        unloaded(model, **arguments)


def test_every_option_stands_in_the_signature_and_is_the_same_for_all_policies():
    of_policy, of_examples = (inspect.signature(kind).parameters for kind in (PolicyModule, SupervisedModule))
    assert not any(option.kind is option.VAR_KEYWORD for option in (*of_policy.values(), *of_examples.values()))
    shared = [name for name in of_policy if name in of_examples and name not in ("loss", "reward")]
    assert len(shared) == 16 and list(of_policy)[-16:] == list(of_examples)[-16:] == shared
    assert all(of_policy[name] == of_examples[name] for name in shared)


def test_examples_without_a_loss_are_refused(model):
    with pytest.raises(ConfigError, match=r"needs model\.loss; or take SupervisedModule or PreferenceModule"):
        ExampleModule.unloaded(model=str(model))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"samples_per_prompt": 1, "advantage": LeaveOneOutAdvantage()}, "=1: LeaveOneOutAdvantage compares .* to 2 or more"),
        ({"reward": WeightedSum([OverlongPenalty(512, 100)])}, "OverlongPenalty: .*max_new_tokens=6, .* would never act"),
    ],
)
def test_what_cannot_work_is_refused_at_once(model, sums, tmp_path, monkeypatch, policy, message):
    """And more, by the command line: `test_cli_errors`."""
    monkeypatch.setattr(PolicyModule, "generate", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(ConfigError, match=message):
        fit(model, sums, tmp_path, policy=policy)


def test_settings_are_checked_once_a_run(model, sums, tmp_path, monkeypatch):
    checked, check = [], PolicyModule.check_run_settings
    monkeypatch.setattr(PolicyModule, "check_run_settings", lambda self: checked.append(self.trainer.state.fn) or check(self))
    module = fit(model, sums, tmp_path, max_steps=1)
    data = build_data(sums, validation_fraction=0.25)
    build_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert checked == ["fit", "validate"], "in a fit before modules are scored, and not again"


def test_a_run_that_was_checked_is_the_run_that_was_not(model, sums, tmp_path):
    expected = fit(model, sums, tmp_path)
    torch.manual_seed(11)
    trainer, data = build_trainer(tmp_path, build_adapter(scorer=Random())), build_data(sums)
    module = build_policy(model, kind=PolicyModule.unloaded)
    trainer.check(module, data)
    assert not module.is_loaded
    module.load()
    trainer.fit(module, datamodule=data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in expected.state_dict().items())

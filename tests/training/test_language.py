"""A module that is made without its model, and loads it when that is asked for."""

import inspect
from operator import attrgetter

import pytest
import torch
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit

from hybrid_lightning.adapters import Random
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.policy import PolicyModule, SupervisedModule
from hybrid_lightning.rewards import ExactMatch
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling


class Widened(PolicyModule):
    """Looks at its model while it is made, as a user's may."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.width = self.model.config.hidden_size


def unloaded(model, kind=PolicyModule, **arguments):
    return kind.unloaded(GRPOLoss(), ExactMatch(), model=str(model), **arguments)


def test_what_is_loaded_later_is_the_same_module_and_a_constructor_that_looks_at_it_has_it_loaded(model):
    module, expected = unloaded(model), PolicyModule(GRPOLoss(), ExactMatch(), model=str(model))
    assert not module.policy.is_loaded and expected.is_loaded and dict(module.hparams) == dict(expected.hparams)
    module.policy.load()
    assert module.policy.is_loaded and module.state_dict().keys() == expected.state_dict().keys()
    for name in ("base_parameters", "pretrained.stop_ids", "base_digest"):
        assert attrgetter(name)(module) == attrgetter(name)(expected)
    first = module.model
    module.policy.load()
    assert module.model is first, "once"
    module = unloaded(model, Widened)
    assert module.width == 32 and module.policy.is_loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "half"}, "model.dtype must be one of"),
        ({"lr_lora": float("nan")}, r"model\.lr_lora must be a non-negative number, got nan"),
        ({"eval_samples": 0}, r"model\.eval_samples must be at least 1, got 0"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be at least 1, got 0"),
        ({"samples_per_prompt": 1, "dynamic_sampling": DynamicSampling()}, "looks for prompts whose completions differ"),
    ],
)
def test_arguments_are_checked_before_weights_are_loaded(model, monkeypatch, arguments, message):
    monkeypatch.setattr("hybrid_lightning.model.pretrained.load_model", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises((ConfigError, ModelError), match=message):
        unloaded(model, **arguments)


def test_every_option_stands_in_the_signature_and_is_the_same_for_all_policies():
    of_policy, of_examples = (inspect.signature(kind).parameters for kind in (PolicyModule, SupervisedModule))
    assert not any(option.kind is option.VAR_KEYWORD for option in (*of_policy.values(), *of_examples.values()))
    shared = [name for name in of_policy if name in of_examples and name not in ("loss", "reward")]
    assert len(shared) == 16 and list(of_policy)[-16:] == list(of_examples)[-16:] == shared
    assert all(of_policy[name] == of_examples[name] for name in shared)


def test_settings_are_checked_once_a_run_which_may_be_before_the_model_is_loaded(model, sums, tmp_path, monkeypatch):
    checked, check = [], PolicyModule.check_run_settings
    monkeypatch.setattr(PolicyModule, "check_run_settings", lambda self: checked.append(self.trainer.state.fn) or check(self))
    expected = fit(model, sums, tmp_path)
    build_trainer(tmp_path).validate(expected, datamodule=build_data(sums, validation_fraction=0.25), verbose=False)
    assert checked == ["fit", "validate"], "in a fit before modules are scored, and not again"
    torch.manual_seed(11)
    trainer, data = build_trainer(tmp_path, build_adapter(scorer=Random())), build_data(sums)
    module = build_policy(model, kind=PolicyModule.unloaded)
    trainer.check(module, data)
    assert not module.policy.is_loaded
    module.policy.load()
    trainer.fit(module, datamodule=data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in expected.state_dict().items())

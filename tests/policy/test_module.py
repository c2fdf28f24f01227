"""A policy in training: learning rates, the start policy, checkpointing and dropout."""

import pytest
import torch
from tiny_models import build_model
from tiny_runs import Log, build_adapter, fit, trained, write_model

from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.policy.optim import CosineSchedule


def weights_after(model, sums, root, *callbacks, policy=None, **flags):
    arguments = {"optimizer": torch.optim.SGD, "lr_full": 0.05, "lr_lora": 0.1, "minibatches_per_rollout": 2, **(policy or {})}
    module = fit(model, sums, root, *callbacks, policy=arguments, **flags)
    return trained(module)


def test_each_learning_rate_moves_its_own_parameters_and_gradient_clipping_limits_the_step(model, sums, tmp_path):
    start = weights_after(model, sums, tmp_path, policy={"lr_full": 0.0, "lr_lora": 0.0}, max_steps=1)

    def step(**rates):
        after = weights_after(model, sums, tmp_path, policy=rates, max_steps=1)
        return {name: after[name] - start[name] for name in start}

    once, twice = step(lr_full=0.05, lr_lora=0.1), step(lr_full=0.05, lr_lora=0.2)
    full = {name for name in start if "modules_to_save" in name}
    assert 0 < len(full) < len(start)
    for name in start:
        torch.testing.assert_close(twice[name], once[name] * (1 if name in full else 2), atol=1e-7, rtol=1e-4, msg=name)
    assert all(bool(once[name].any()) for name in start if "lora_A" not in name), "B is zero, so A has no gradient yet"
    watch = Watch()
    rates = {"lr_full": 1.0, "lr_lora": 1.0}
    after = weights_after(model, sums, tmp_path, watch, policy=rates, max_steps=1, gradient_clip_val=0.01)
    length = torch.stack([(after[name] - start[name]).norm() for name in start]).norm()
    assert float(length) == pytest.approx(0.01, rel=1e-3)
    assert watch.metrics[0]["grad_norm/full"] > 0.05, "what is logged is the norm before clipping"


class Watch(Log):
    """And learning rates, and the optimizer's parameter groups."""

    def on_train_start(self, trainer, pl_module):
        self.rates = []
        self.groups = [(group["name"], len(group["params"]), group["lr"]) for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize(("share", "names"), [(0.0, ["lora"]), (1.0, ["full"])])
def test_the_ends_of_the_budget_have_one_group(model, sums, tmp_path, share, names):
    watch = Watch()
    policy = fit(model, sums, tmp_path, watch, build_adapter(share), max_steps=1)
    assert [name for name, *_ in watch.groups] == names
    rates = {"full": policy.lr_full, "lora": policy.lr_lora}
    assert all(rate == rates[name] for name, _, rate in watch.groups)
    assert sum(count for _, count, _ in watch.groups) == len(trained(policy))
    assert all(watch.metrics[0][f"grad_norm/{name}"] > 0 for name in names)


def test_the_schedule_sets_both_rates_at_every_step(model, sums, tmp_path):
    schedule, watch = CosineSchedule(warmup_steps=2, final_factor=0.1), Watch()
    policy = {"schedule": schedule, "lr_full": 1e-3, "lr_lora": 1e-2, "minibatches_per_rollout": 2}
    fit(model, sums, tmp_path, watch, policy=policy, max_steps=6, accumulate_grad_batches=2)
    factors = [schedule.factor(step, 6) for step in range(6) for _ in range(2)]
    assert watch.rates == [pytest.approx([1e-3 * factor, 1e-2 * factor]) for factor in factors]


def test_the_start_policy_needs_no_second_model(model, sums, tmp_path):
    base = build_model("llama", std=0.1)
    policy = fit(model, sums, tmp_path, policy={"loss": GRPOLoss(kl_coef=0.05), "lr_lora": 0.1}, max_steps=4)
    count = sum(parameter.numel() for parameter in policy.parameters())
    assert count == sum(parameter.numel() for parameter in base.parameters()) + policy.plan.trainable_parameters()
    assert sum(isinstance(module, type(base)) for module in policy.modules()) == 1
    ids = torch.tensor([[4, 5, 13, 6, 16]])
    with policy.start_policy():
        assert torch.equal(policy.model(ids).logits, base(ids).logits)
    assert not torch.allclose(policy.model(ids).logits, base(ids).logits, atol=1e-3)


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gradient_checkpointing_changes_nothing(model, sums, tmp_path, adapter):
    """That it recomputes is seen by what is held: `tests/memory/test_against_runs.py`."""
    policies = ({"gradient_checkpointing": False}, {"gradient_checkpointing": True})
    results = [weights_after(model, sums, tmp_path, build_adapter(**adapter), policy=each, max_steps=2) for each in policies]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_the_base_stays_off_and_that_of_lora_is_on(tmp_path, sums, checkpointing):
    """GPT-2 has dropout of its own, with which the first minibatch would not be on-policy."""
    model = write_model(tmp_path / "gpt2", "gpt2")
    ratios = []
    for dropout in (0.0, 0.5):
        watch = Watch()
        policy = {"epochs_per_rollout": 2, "gradient_checkpointing": checkpointing, "lr_lora": 0.1}
        fit(model, sums, tmp_path, watch, build_adapter(0, dropout=dropout), policy=policy, max_steps=3)
        ratios.append([step["ratio/max"] for step in watch.metrics])
    assert ratios[0][0] == ratios[0][2] == pytest.approx(1, abs=1e-5)
    assert ratios[1][2] > 1.01, "from the third step on B is not zero, so that LoRA's dropout shows"

import pytest
import torch
from tiny_runs import Log, build_adapter, fit, trained, write_model


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
    watch = Log()
    rates = {"lr_full": 1.0, "lr_lora": 1.0}
    after = weights_after(model, sums, tmp_path, watch, policy=rates, max_steps=1, gradient_clip_val=0.01)
    length = torch.stack([(after[name] - start[name]).norm() for name in start]).norm()
    assert float(length) == pytest.approx(0.01, rel=1e-3)
    assert watch.metrics[0]["grad_norm/full"] > 0.05, "what is logged is the norm before clipping"


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
        watch = Log()
        policy = {"epochs_per_rollout": 2, "gradient_checkpointing": checkpointing, "lr_lora": 0.1}
        fit(model, sums, tmp_path, watch, build_adapter(0, dropout=dropout), policy=policy, max_steps=3)
        ratios.append([step["ratio/max"] for step in watch.metrics])
    assert ratios[0][0] == ratios[0][2] == pytest.approx(1, abs=1e-5)
    assert ratios[1][2] > 1.01, "from the third step on B is not zero, so that LoRA's dropout shows"

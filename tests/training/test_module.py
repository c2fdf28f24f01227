import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import Log, build_adapter, fit, trained, write_model


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
    assert watch.metrics[0]["grad_norm/full"] > 0.05, "what is logged is the norm before clipping"


def test_dropout_of_the_base_stays_off_and_that_of_lora_is_on(tmp_path, sums):
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

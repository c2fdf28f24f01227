"""`16-mixed`: float16 under autocast, with a scaled loss. On a CPU Lightning wants it as a plugin."""

import pytest
import tiny_runs
import torch
from cli_runs import run as command
from cli_runs import write_folder
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_runs import fit

from hybrid_lightning.losses import GSPOLoss


class Log(tiny_runs.Log):
    """And scale and weights after every step."""

    def __init__(self):
        super().__init__()
        self.scales, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))


def run(model, sums, root, scale=2.0**12, **options):
    log = Log()
    policy = {"loss": GSPOLoss(kl_coef=0.01), "minibatches_per_rollout": 2, "dtype": "float16", **options.pop("policy", {})}
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    module = fit(model, sums, root, log, policy=policy, plugins=[plugin], **{"max_steps": 4, **options})
    return module, log


@pytest.mark.parametrize("policy", [{}, {"dtype": "float32"}, {"max_tokens_per_micro_batch": 24, "gradient_checkpointing": True}])
def test_it_trains_and_begins_on_policy(model, sums, tmp_path, policy):
    module, log = run(model, sums, tmp_path, policy=policy, gradient_clip_val=0.5)
    assert str(module.trainer.precision) == "16-mixed"
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in module.parameters()}
    assert dtypes == {True: torch.float32, False: torch.float32 if "dtype" in policy else torch.float16}
    assert log.metrics[0]["ratio/max"] == log.metrics[2]["ratio/max"] == 1 != log.metrics[1]["ratio/max"]
    assert log.metrics[0]["kl"] == 0 < log.metrics[1]["kl"]
    assert all(step["sampling/logp_difference/mean"] < 2e-3 for step in log.metrics)


def test_a_step_with_gradients_that_are_too_large_is_left_out(model, sums, tmp_path):
    _, log = run(model, sums, tmp_path, scale=2.0**22, max_steps=12)
    moved = [not torch.equal(*pair) for pair in zip(log.weights, log.weights[1:], strict=False)]
    lowered = [after < before for before, after in zip(log.scales, log.scales[1:], strict=False)]
    assert log.scales[0] == 2.0**21 and any(lowered) and any(moved)
    assert all(one != other for one, other in zip(moved, lowered, strict=True)), "either a step or a smaller scale"
    assert log.weights[-1].isfinite().all()


def test_a_resumed_run_goes_on_with_its_scale(model, sums, tmp_path):
    _, unstopped = run(model, sums, tmp_path, scale=2.0**18)
    module, _ = run(model, sums, tmp_path, scale=2.0**18, max_steps=2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, log = run(model, sums, tmp_path, ckpt=tmp_path / "last.ckpt")
    assert log.scales == unstopped.scales[2:] and all(map(torch.equal, log.weights, unstopped.weights[2:]))


def test_the_command_line_takes_the_plugin(tmp_path):
    plugins = "--trainer.plugins=lightning.pytorch.plugins.MixedPrecision"
    options = [plugins, "--trainer.plugins.precision=16-mixed", "--trainer.plugins.device=cpu", "--trainer.max_steps=1"]
    for folder in write_folder(tmp_path):
        result = command(folder, "fit", "--config", "t.yaml", *options)
        assert result.code == 0, result.err

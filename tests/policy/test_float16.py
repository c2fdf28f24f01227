"""`16-mixed`: float16 under autocast, with a scaled loss. On a CPU Lightning wants it as a plugin."""

from functools import partial

import pytest
import torch
from cli_runs import run as command
from cli_runs import write_folder
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit

from hybrid_lightning.engine.logprobs import token_logprobs
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.types import Prompt


class Log(Callback):
    """Metrics, scale and weights after every step."""

    def __init__(self):
        self.metrics, self.scales, self.weights = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))


def plugin(scale=2.0**12):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def run(model, sums, root, scale=2.0**12, **options):
    log = Log()
    policy = {"loss": GSPOLoss(kl_coef=0.01), "minibatches_per_rollout": 2, "dtype": "float16", **options.pop("policy", {})}
    module = fit(model, sums, root, log, policy=policy, plugins=[plugin(scale)], **{"max_steps": 4, **options})
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


def test_gradients_are_nearer_to_float32_than_those_of_bfloat16(model, sums, tmp_path):
    module = fit(model, sums, tmp_path, build_adapter(), policy={"loss": GSPOLoss()}, max_steps=2)
    rollouts = module.generate([Prompt(text="1+1="), Prompt(text="2+3=")], 4, torch.Generator().manual_seed(0))
    weights = torch.randn(8, generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def gradient(dtype, scale=1.0):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = (token_logprobs(module.engine, rollouts.sequences, 1.0)[0].sum(1) * weights).mean()
        return torch.cat([part.flatten() / scale for part in torch.autograd.grad(loss * scale, trained)])

    exact = gradient(None)
    half, brain = ((gradient(*how) - exact).norm() / exact.norm() for how in ((torch.float16, 2.0**12), (torch.bfloat16,)))
    assert half < 3e-3 and half < brain / 2


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
    log = Log()
    policy = build_policy(model, loss=GSPOLoss(kl_coef=0.01), minibatches_per_rollout=2, dtype="float16")
    trainer = build_trainer(tmp_path, build_adapter(), log, plugins=[plugin()], max_steps=4)
    trainer.fit(policy, datamodule=build_data(sums), ckpt_path=tmp_path / "last.ckpt")
    assert log.scales == unstopped.scales[2:] and all(map(torch.equal, log.weights, unstopped.weights[2:]))


def test_a_fused_optimizer_is_refused(model, sums, tmp_path):
    with pytest.raises(ConfigError, match=r"fused=true does not work with trainer\.precision=16-mixed"):
        run(model, sums, tmp_path, policy={"optimizer": partial(torch.optim.AdamW, fused=True)})


def test_the_command_line_takes_the_plugin(tmp_path):
    plugins = "--trainer.plugins=lightning.pytorch.plugins.MixedPrecision"
    options = [plugins, "--trainer.plugins.precision=16-mixed", "--trainer.plugins.device=cpu", "--trainer.max_steps=1"]
    for folder in write_folder(tmp_path):
        result = command(folder, "fit", "--config", "t.yaml", *options)
        assert result.code == 0, result.err

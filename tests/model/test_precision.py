"""`bf16-true`, which trains as float32 weights under autocast do; `16-mixed`, with a scaled loss; and what is refused."""

from functools import partial

import pytest
import tiny_runs
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from rounding import assert_same_logits
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, trained
from transformers import AutoModelForCausalLM

from hybrid_lightning.adapters import Random, Scoring, TailEnergy
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.export import MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.model.precision import check_precision
from hybrid_lightning.training.module import PolicyModule
from hybrid_lightning.types import Prompt

IDS = torch.tensor([[4, 5, 13, 6, 16]])
TRUE = "bf16-true"


class Log(tiny_runs.Log):
    """And dtypes of every micro-batch; scale, where there is one, and weights after every step."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.scales, self.weights = set(), [], []

    def on_train_start(self, trainer, pl_module):
        self.start = trained(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        given = (batch.advantages, batch.old_logprobs, batch.ref_logprobs, outputs["loss"])
        self.dtypes |= {tensor.dtype for tensor in given if tensor is not None} | {torch.get_default_dtype()}
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            self.scales.append(scaler.get_scale())
            self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))


def run(model, sums, root, precision=TRUE, policy=None, adapter=None, **flags):
    log = Log()
    arguments = {"dtype": "bfloat16", "loss": GSPOLoss(kl_coef=0.01), "minibatches_per_rollout": 2, **(policy or {})}
    flags = {"max_steps": 3, "precision": precision, **flags}
    return fit(model, sums, root, log, build_adapter(**{"scorer": Random(), **(adapter or {})}), policy=arguments, **flags), log


@pytest.fixture(scope="module")
def runs(model, sums, tmp_path_factory):
    """By precision: the policy after three steps, within a rollout, its log, and its checkpoint."""
    found = {}
    for precision in (TRUE, "bf16-mixed"):
        path = tmp_path_factory.mktemp(precision) / "last.ckpt"
        module, log = run(model, sums, path.parent, precision)
        module.trainer.save_checkpoint(path)
        found[precision] = module, log, path
    return found


def test_with_one_pass_a_step_it_is_the_mixed_run_bit_for_bit(runs):
    (module, log, _), (mixed, before, _) = runs.values()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert log.dtypes == {torch.float32}, "neither batches nor new tensors are rounded"
    for name, weight in trained(mixed).items():
        assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), trained(module)[name]), name
    # Norms of gradients come from torch's own function there, and from float32 sums of bfloat16 here: the same to rounding.
    for mine, theirs in zip(log.metrics, before.metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6) and mine["sampling/logp_difference/mean"] < 0.02
    assert log.metrics[0]["ratio/max"] == log.metrics[2]["ratio/max"] == 1 != log.metrics[1]["ratio/max"]
    assert log.metrics[0]["kl"] == 0 < log.metrics[1]["kl"]


def masters(module):
    """The float32 weights of a run under bf16-true."""
    optimizer = module.optimizers(use_pl_optimizer=False)
    state, names = optimizer.state_dict()["state"], {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[parameter]: state[number]["master_weight"] for number, parameter in enumerate(parameters)}


def test_otherwise_sums_of_gradients_are_rounded_and_no_more(model, sums, tmp_path):
    """Of several passes, accumulated and clipped."""
    policy = {"optimizer": torch.optim.SGD, "lr_full": 0.02, "lr_lora": 0.05, "max_tokens_per_micro_batch": 24}
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_steps": 1}
    mixed, log = run(model, sums, tmp_path / "mixed", "bf16-mixed", policy, **flags)
    found = masters(run(model, sums, tmp_path / "true", TRUE, policy, **flags)[0])
    for name, weight in trained(mixed).items():
        step = weight - log.start[name]
        if step.any():  # LoRA's A begins with a gradient of zero
            assert 0 < (found[name] - weight).norm() < 0.005 * step.norm(), name


def test_a_run_that_was_stopped_goes_on_bit_for_bit_in_its_own_precision(model, sums, tmp_path, runs):
    unstopped, expected = run(model, sums, tmp_path / "whole", max_steps=5)
    module, log = run(model, sums, tmp_path / "rest", ckpt=runs[TRUE][2], max_steps=5)
    assert [step["loss"] for step in log.metrics] == [step["loss"] for step in expected.metrics[3:]]
    for name, weight in masters(unstopped).items():
        assert torch.equal(weight, masters(module)[name]), name
    with pytest.raises(CheckpointError, match=r"trained weights of torch\.bfloat16.*precision=bf16-mixed.*give the precision"):
        run(model, sums, tmp_path, "bf16-mixed", ckpt=runs[TRUE][2])
    with pytest.raises(CheckpointError, match=r"trained weights of torch\.float32.*precision=bf16-true"):
        run(model, sums, tmp_path, TRUE, ckpt=runs["bf16-mixed"][2])


def test_a_checkpoint_is_evaluated_in_any_precision_alone_and_exported(model, sums, tmp_path, runs):
    (module, _, path), data = runs[TRUE], build_data(sums, test_fraction=0.25)
    policy, trainer = build_policy(model, dtype="bfloat16"), build_trainer(tmp_path, precision="bf16-mixed")
    trainer.test(policy, datamodule=data, ckpt_path=path, verbose=False)
    assert all(torch.equal(weight.bfloat16(), trained(module)[name]) for name, weight in trained(policy).items())
    alone = PolicyModule.load_from_checkpoint(path)
    greedy = [policy.generate([Prompt(text="1+2=")], greedy=True) for policy in (alone, module)]
    assert greedy[0].completions == greedy[1].completions
    write_policy(policy_of_checkpoint(path), MergedModel("float32"), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        assert_same_logits(exported(IDS).logits, alone.model.eval().float()(IDS).logits)


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("bf16-true", "float32", r"bf16-true needs model\.dtype=bfloat16, got model\.dtype=float32; or use bf16-mixed"),
        ("16-true", "float16", r"16-true is not supported: small gradients vanish in float16; use 16-mixed"),
        ("64-true", "float32", r"precision=64-true is not supported"),
        ("16-mixed", "float16", r"fused=true does not work with trainer\.precision=16-mixed"),
        ("32-true", "float16", r"model\.dtype=float16 needs trainer\.precision=16-mixed, got"),
    ],
)
def test_what_does_not_fit_together_is_refused(precision, dtype, message):
    with pytest.raises(ConfigError, match=message):
        check_precision(precision, dtype, partial(torch.optim.AdamW, fused=True))


# ---- float16 under autocast; on a CPU Lightning wants it as a plugin


def run_16(model, sums, root, scale=2.0**12, policy=None, **flags):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    policy = {"dtype": "float16", **(policy or {})}
    return run(model, sums, root, None, policy, {"scorer": TailEnergy()}, plugins=[plugin], **flags)


def test_in_float16_it_trains_and_begins_on_policy(model, sums, tmp_path, monkeypatch):
    policy = {"max_tokens_per_micro_batch": 24, "gradient_checkpointing": True}
    scales, differentiate = set(), Scoring.differentiate
    monkeypatch.setattr(Scoring, "differentiate", lambda *of: scales.add(of[0]._loss_scale) or differentiate(*of))
    module, log = run_16(model, sums, tmp_path, policy=policy, gradient_clip_val=0.5)
    assert str(module.trainer.precision) == "16-mixed" and scales == {4096.0}
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in module.parameters()}
    assert dtypes == {True: torch.float32, False: torch.float16}
    assert log.metrics[0]["ratio/max"] == log.metrics[2]["ratio/max"] == 1 != log.metrics[1]["ratio/max"]
    assert log.metrics[0]["kl"] == 0 < log.metrics[1]["kl"]
    assert all(step["sampling/logp_difference/mean"] < 2e-3 for step in log.metrics)


def test_a_step_with_gradients_that_are_too_large_is_left_out_and_a_resumed_run_goes_on_with_its_scale(model, sums, tmp_path):
    _, log = run_16(model, sums, tmp_path, scale=2.0**19, max_steps=5)
    moved = [not torch.equal(*pair) for pair in zip(log.weights, log.weights[1:], strict=False)]
    lowered = [after < before for before, after in zip(log.scales, log.scales[1:], strict=False)]
    assert log.scales[0] == 2.0**18 and any(lowered) and any(moved)
    assert all(one != other for one, other in zip(moved, lowered, strict=True)), "either a step or a smaller scale"
    assert log.weights[-1].isfinite().all()
    module, _ = run_16(model, sums, tmp_path, scale=2.0**19, max_steps=1)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, rest = run_16(model, sums, tmp_path, ckpt=tmp_path / "last.ckpt", max_steps=4)
    assert rest.scales == log.scales[1 : 1 + len(rest.scales)] and all(map(torch.equal, rest.weights, log.weights[1:]))

"""`bf16-mixed` on a bfloat16 base; `16-mixed`, with a scaled loss; and what is refused."""

from functools import partial

import pytest
import tiny_runs
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_runs import build_adapter, build_data, build_policy, fit

from hybrid_lightning.adapters import Random, Scoring, TailEnergy
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.memory import RunSettings, TrainerFlags
from hybrid_lightning.memory import settings as memory_settings
from hybrid_lightning.model import precision as precision_module
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.model.precision import check_precision
from hybrid_lightning.runner import ModelRunner
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.types import Prompt

IDS = torch.tensor([[4, 5, 13, 6, 16]])


class Log(tiny_runs.Log):
    """Also notes dtypes of every micro-batch, and after every step the weights and the scale, if there is one."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.scales, self.weights = set(), [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        given = (batch.advantages, batch.old_logprobs, batch.ref_logprobs, outputs["loss"])
        self.dtypes |= {tensor.dtype for tensor in given if tensor is not None} | {torch.get_default_dtype()}
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            self.scales.append(scaler.get_scale())
            self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))


def run(model, sums, root, precision="bf16-mixed", policy=None, adapter=None, **flags):
    log = Log()
    arguments = {"dtype": "bfloat16", "loss": GSPOLoss(kl_coef=0.01), "minibatches_per_rollout": 2, **(policy or {})}
    flags = {"max_steps": 3, "precision": precision, **flags}
    return fit(model, sums, root, log, build_adapter(**{"scorer": Random(), **(adapter or {})}), policy=arguments, **flags), log


@pytest.fixture(scope="module")
def mixed(model, sums, tmp_path_factory):
    """The policy after three steps, within a rollout, its log, and its checkpoint."""
    path = tmp_path_factory.mktemp("mixed") / "last.ckpt"
    module, log = run(model, sums, path.parent)
    module.trainer.save_checkpoint(path)
    return module, log, path


def test_on_a_bfloat16_base_float32_weights_are_trained_and_it_begins_on_policy(mixed):
    module, log, _ = mixed
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in module.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert log.dtypes == {torch.float32}, "neither batches nor new tensors are rounded"
    assert all(step["sampling/logp_difference/mean"] < 0.02 for step in log.metrics)
    assert log.metrics[0]["ratio/max"] == log.metrics[2]["ratio/max"] == 1 != log.metrics[1]["ratio/max"]
    assert log.metrics[0]["kl"] == 0 < log.metrics[1]["kl"]


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        *(
            (f"{kind}-true", "float32", rf"precision={kind}-true is not supported: .*; use bf16-mixed")
            for kind in ("bf16", "16", "64")
        ),
        ("16-mixed", "float16", r"fused=true does not work with trainer\.precision=16-mixed"),
        ("32-true", "float16", r"model\.dtype=float16 needs trainer\.precision=16-mixed, got"),
        ("32-true", "bfloat16", r"model\.dtype=bfloat16 needs trainer\.precision=bf16-mixed, got"),
    ],
)
def test_what_does_not_fit_together_is_refused(precision, dtype, message):
    with pytest.raises(ConfigError, match=message):
        check_precision(precision, dtype, partial(torch.optim.AdamW, fused=True))


# ---- a processor without instructions for 16 bits

WHY = "this processor has no instructions for bfloat16"


@pytest.fixture
def old_processor(monkeypatch):
    """Notes how products are computed on one: whether in 16 bits by autocast, and the dtype that sampling got."""
    computed, logprobs, sampling = set(), Passes.logprobs, ModelRunner.sampling

    def noted(passes, sequences):
        computed.add(torch.is_autocast_enabled("cpu"))
        return logprobs(passes, sequences)

    def sampled(engine, dtype=None):
        computed.add((torch.is_autocast_enabled("cpu"), dtype))
        return sampling(engine, dtype)

    monkeypatch.setattr(Passes, "logprobs", noted)
    monkeypatch.setattr(ModelRunner, "sampling", sampled)
    for module in (precision_module, memory_settings):
        monkeypatch.setattr(module, "why_no_halves", lambda: WHY)
    return computed


def test_without_instructions_for_bfloat16_all_products_are_float32_and_numbers_equal_autocast(
    model, sums, tmp_path, mixed, old_processor, monkeypatch
):
    flags = {"adapter": {"scorer": TailEnergy()}, "policy": {"gradient_checkpointing": True}}
    module, log = run(model, sums, tmp_path, **flags, limit_val_batches=0)
    assert old_processor == {False, (False, None)}, "scoring, sampling and training"
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    assert all(torch.equal(weight, weight.bfloat16()) for weight in frozen), "the values that a bfloat16 base has"
    assert all(step["sampling/logp_difference/mean"] < 1e-5 for step in log.metrics)
    other, _, path = mixed
    assert module.policy.base_digest == other.policy.base_digest, "checkpoints and plans of other processors fit"
    assert f"16-bit matrix products off: {WHY}" in module.policy.runner.description()
    with pytest.warns(UserWarning, match=r"this one continues \(16-bit matrix products off: this processor"):
        run(model, sums, tmp_path, ckpt=path, max_steps=4)
    # The same weights and tokens in 16 bits and in float32, without a Trainer.
    sequences = other.generate([Prompt(text="1+2=")], 4, torch.Generator().manual_seed(0)).sequences
    found = []
    for why in (WHY, ""):
        monkeypatch.setattr(precision_module, "why_no_halves", lambda why=why: why)
        alone = PolicyModule.load_from_checkpoint(path)
        found.append(alone.task.passes.measure([sequences])[0][0])
        assert ("16-bit matrix products" in alone.policy.runner.description()) == bool(why)
    assert 0 < (found[0] - found[1]).abs().max() < 0.1


def test_a_plan_knows_of_it_and_weights_that_would_not_fit_stay_with_a_warning(model, sums, tmp_path, monkeypatch, old_processor):
    policy, data = build_policy(model, dtype="bfloat16"), build_data(sums)
    dtypes = []
    for on_cpu in (True, False):
        settings = RunSettings.of(policy, build_adapter(), data, TrainerFlags(on_cpu=on_cpu, precision="bf16-mixed"), 8)
        dtypes += [settings.dtype, settings.product_dtype]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    monkeypatch.setattr(precision_module, "memory_of", lambda device: 1000)
    with pytest.warns(UserWarning, match=f"{WHY}, so .* do not fit into half of this machine's 0.0 GiB; use a smaller"):
        module, _ = run(model, sums, tmp_path, max_steps=1)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32, torch.bfloat16}


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


def test_a_step_with_gradients_that_are_too_large_is_left_out_and_a_resumed_run_keeps_its_scale(model, sums, tmp_path):
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

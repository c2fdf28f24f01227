"""In 16 bits, and on a quantized base, sharded runs equal runs under DDP or in one process, and ranks skip the same steps."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from rounding import metrics_of_runs
from runs_of_tests import ADAM, STRATEGIES, Only, assert_same_run
from tiny_runs import write_sums, write_wide_model

from hybrid_lightning.losses import GRPOLoss, GSPOLoss
from hybrid_lightning.model import NF4

# Clipped far away: at GSPO's own range rounding decides which sequences are clipped, and gradient norms of a second pass over a
# rollout differ by a half.
LOSS = GSPOLoss(clip_low=0.09, clip_high=0.09, kl_coef=0.02)
PASSES = {"minibatches_per_rollout": 1, "epochs_per_rollout": 2, "loss": LOSS}
BFLOAT16 = {  # by dtype of the model and precision
    name: {"policy": {"dtype": name.split()[0], **PASSES}, "precision": name.split()[1], "max_steps": 3, "limit_val_batches": 0}
    for name in ("bfloat16 bf16-mixed", "float32 bf16-mixed")
}
pytestmark = pytest.mark.long
SMALL, LARGE = 2.0**10, 2.0**22  # scales of the loss; gradients overflow with the second


class Scales(Callback):
    """Begins with a scale, and notes what becomes of it."""

    def __init__(self, first):
        self.first, self.held = first, []

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler._init_scale = self.first

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.held.append(trainer.precision_plugin.scaler.get_scale())


def in_float16(scale):
    """A run that begins with this scale."""
    # Only completions of some prompts earn different rewards, so that ranks overflow one by one. Both steps are of one rollout:
    # the weights differ by float16's rounding, so a second rollout might draw another token.
    policy = {**ADAM, "loss": GRPOLoss(kl_coef=0.02), "reward": Only(tuple(range(0, 24, 3)))}
    plugins = [MixedPrecision("16-mixed", "cpu")]  # which Lightning wants on a CPU
    return {"policy": policy, "callbacks": (Scales(scale),), "limit_val_batches": 0, "max_steps": 2, "plugins": plugins}


@pytest.fixture(scope="module")
def single(train_on):
    return train_on(1, {"float16": in_float16(SMALL)})[0]["float16"]


@pytest.fixture(scope="module")
def sharded(train_on):
    """The runs of each rank, which trains under one strategy after the other: (strategy, kind or scale) -> result."""
    jobs = {
        (name, kind): {**job, "strategy": strategy} for name, strategy in STRATEGIES.items() for kind, job in BFLOAT16.items()
    }
    # Not under DDP, which has whole gradients.
    jobs |= {("fsdp2", scale): {**in_float16(scale), "strategy": STRATEGIES["fsdp2"]} for scale in (SMALL, LARGE)}
    return train_on(2, jobs)


@pytest.mark.parametrize("kind", BFLOAT16)
def test_fsdp2_computes_in_bfloat16_what_ddp_computes(sharded, kind):
    one, other = sharded[0]["fsdp2", kind], sharded[0]["ddp", kind]
    assert {weight.dtype for weight in one["weights"].values()} == {torch.float32}
    torch.testing.assert_close(one["weights"], other["weights"], atol=1e-5, rtol=0)
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        assert mine == pytest.approx(theirs, **metrics_of_runs())
    for strategy in STRATEGIES:
        ratios = [step["ratio/max"] for step in sharded[0][strategy, kind]["steps"]]
        assert ratios[0] == ratios[2] == 1.0 < ratios[1], f"{strategy}: the first step of every rollout has a ratio of one"


def test_in_float16_it_is_the_run_of_one_process_and_ranks_leave_out_the_same_steps(single, sharded):
    for found in (rank["fsdp2", SMALL] for rank in sharded):
        assert found["plan"] == single["plan"] and found["held"] == single["held"] == [SMALL] * 2
        for one, other in zip(found["steps"], single["steps"], strict=True):
            assert one == pytest.approx(other, rel=5e-3, abs=1e-3)
        for name, weight in single["weights"].items():
            assert (found["weights"][name] - weight).norm() < 1e-3 * weight.norm() + 1e-4, name
    first, second = (rank["fsdp2", LARGE] for rank in sharded)
    assert first["held"] == second["held"] and LARGE / 2 >= first["held"][0] > first["held"][-1]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and weight.isfinite().all()


def test_ddp_on_a_quantized_base_is_the_same_run(train_on, tmp_path):
    """Every rank quantizes the base for itself."""
    pytest.importorskip("bitsandbytes")
    write_wide_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", 24)
    arguments = {"jobs": {"nf4": {"policy": {"quantization": NF4()}, "max_steps": 2}}, "folder": tmp_path}
    (single,) = train_on(1, **arguments)
    for rank in train_on(2, **arguments, strategy="ddp"):
        assert len(rank["nf4"]["steps"]) == 2
        assert_same_run(rank["nf4"], single["nf4"], rtol=1e-5)

"""Loss, gradient and metrics against the code of TRL's own trainer, called with a stand-in for the trainer."""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hybrid_lightning.advantages import BatchStdAdvantage, GroupAdvantage, GroupMeanAdvantage
from hybrid_lightning.losses import GRPOLoss, GSPOLoss, SequenceMask, SequenceTruncation, TokenMask, TokenTruncation
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd

B, T = 8, 6
# TRL's arguments beside ours. "wide" ratios reach the dual clip, "near" ones straddle GSPO's own clip range.
CASES = {
    "plain": {},
    "wide": {"spread": 1.0},
    "dual clip": {"spread": 1.0, "dual_clip": 1.5},
    "kl": {"kl_coef": 0.04},
    "kl, bias-corrected": {"kl_coef": 0.04, "kl_importance_weight": True},
    "kl, bias-corrected, dual clip": {
        "kl_coef": 0.7,
        "kl_importance_weight": True,
        "dual_clip": 1.5,
        "spread": 1.0,
    },
    "on-policy": {"on_policy": True},
    "on-policy, kl": {"on_policy": True, "kl_coef": 0.5},
    "on-policy, kl, bias-corrected": {"on_policy": True, "kl_coef": 0.5, "kl_importance_weight": True},
}
CLIPS = {GRPOLoss: (0.2, 0.28), GSPOLoss: (3e-4, 4e-4)}
SPREADS = {GRPOLoss: 0.3, GSPOLoss: 1e-3}


def make(dtype, seed, spread, on_policy):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[-1] = 0  # a completion that takes no part still counts among the sequences

    def noisy(scale):
        return (logprobs + scale * torch.randn(B, T, generator=generator, dtype=torch.float64)).to(dtype)

    return LossInputs(
        logprobs=logprobs.to(dtype, copy=True).requires_grad_(),
        advantages=torch.randn(B, generator=generator, dtype=torch.float64).to(dtype),
        completion_mask=torch.arange(T)[None] < lengths[:, None],
        old_logprobs=None if on_policy else noisy(spread),
        ref_logprobs=noisy(0.3),
    )


def trl_loss(inputs: LossInputs, loss, accumulation: int = 1):
    """`GRPOTrainer._compute_loss` on the same tensors and settings, and the metrics that it logs."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (inputs.logprobs, torch.zeros_like(inputs.logprobs), None),
        args=SimpleNamespace(use_bias_correction_kl=loss.kl_importance_weight, delta=loss.dual_clip),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1),
        current_gradient_accumulation_steps=accumulation,
        loss_type="grpo",
        importance_sampling_level="sequence" if isinstance(loss, GSPOLoss) else "token",
        epsilon_low=loss.clip_low,
        epsilon_high=loss.clip_high,
        beta=loss.kl_coef,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=inputs.importance_weights is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    empty = torch.zeros(len(inputs.advantages), 1, dtype=torch.long)
    batch = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(inputs.completion_mask, dtype=torch.long),
        "completion_mask": inputs.completion_mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logprobs,
        "ref_per_token_logps": inputs.ref_logprobs,
        "importance_sampling_ratio": inputs.importance_weights,
    }
    value = GRPOTrainer._compute_loss(trainer, None, batch)
    return value, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trl(case, cls, dtype, seed):
    options = dict(CASES[case])
    inputs = make(dtype, seed, options.pop("spread", SPREADS[cls]), options.pop("on_policy", False))
    loss = cls(*CLIPS[cls], **options)
    ours, (theirs, their_metrics) = loss(inputs), trl_loss(inputs, loss)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours.loss, theirs, **tolerance)
    gradients = [torch.autograd.grad(value, inputs.logprobs)[0] for value in (ours.loss, theirs)]
    torch.testing.assert_close(*gradients, **tolerance)
    assert gradients[0].abs().max() > 1e-3
    shared = set(ours.metrics) & set(their_metrics)
    assert shared >= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    assert ("kl" in shared) == loss.needs_reference
    for name in shared:
        assert ours.metrics[name].item() == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-7), name


def test_the_cases_reach_the_clips():
    """Else the parity above would be one of unclipped ratios."""
    for cls in CLIPS:
        metrics = [cls(*CLIPS[cls])(make(torch.float64, seed, SPREADS[cls], False)).metrics for seed in range(3)]
        for name in ("low", "high"):
            assert 0.1 < sum(part[f"clip_ratio/{name}_mean"] for part in metrics) < 2
        wide = make(torch.float64, 0, 1.0, False)
        capped, free = (cls(*CLIPS[cls], dual_clip=dual)(wide).loss for dual in (1.5, None))
        assert capped < free


@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
def test_accumulated_micro_batches_equal_trl(cls):
    inputs = make(torch.float64, 3, SPREADS[cls], False)
    loss = cls(*CLIPS[cls], kl_coef=0.1)
    names = ("logprobs", "advantages", "completion_mask", "old_logprobs", "ref_logprobs")
    halves = [[getattr(inputs, name)[rows] for name in names] for rows in (slice(0, B // 2), slice(B // 2, B))]
    ours = sum(loss(LossInputs(*half, num_sequences=float(B))).loss for half in halves)
    theirs = sum(trl_loss(LossInputs(*half), loss, accumulation=2)[0] for half in halves)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value, inputs.logprobs)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


MODES = {
    TokenTruncation: "token_truncate",
    TokenMask: "token_mask",
    SequenceTruncation: "sequence_truncate",
    SequenceMask: "sequence_mask",
}


def trl_weights(inputs, sampling_logprobs, mode, cap, floor):
    """TRL computes them in the middle of a method of 600 lines: run that `if` alone."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    (block,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and "self.vllm_importance_sampling_correction" in ast.unparse(node.test)
        if any("vllm_importance_sampling_ratio" in ast.unparse(statement).split(" = ")[0] for statement in node.body)
    ]
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=cap,
        vllm_importance_sampling_clip_min=floor,
    )
    names = {
        "self": trainer,
        "torch": torch,
        "math": math,
        "tool_mask": None,
        "completion_mask": inputs.completion_mask.long(),
        "old_per_token_logps": inputs.old_logprobs,
        "sampling_per_token_logps": sampling_logprobs,
    }
    exec(compile(ast.Module([block], []), "trl", "exec"), names)
    return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize("bounds", [{"cap": 1.1}, {"cap": 1.1, "floor": 0.8}], ids=["cap", "both"])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.04}, {"kl_coef": 0.5, "kl_importance_weight": True}], ids=str)
@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
@pytest.mark.parametrize("correction", MODES)
def test_corrected_loss_and_gradient_equal_trl(correction, cls, options, bounds):
    inputs = make(torch.float64, 4, SPREADS[cls], False)
    noise = torch.randn(B, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampling_logprobs = inputs.old_logprobs + 0.1 * noise
    mask, loss = inputs.completion_mask, cls(*CLIPS[cls], **options)
    weights = F.per_token(correction(**bounds)(inputs.old_logprobs, sampling_logprobs, mask), mask)
    theirs = trl_weights(inputs, sampling_logprobs, MODES[correction], bounds["cap"], bounds.get("floor")).expand(B, T)
    torch.testing.assert_close(weights[mask], theirs[mask], rtol=1e-12, atol=0)
    assert len(weights[mask].unique()) > 2 and {0.0, 1.1} & set(weights[mask].tolist())
    values = (
        loss(replace(inputs, importance_weights=weights)).loss,
        trl_loss(replace(inputs, importance_weights=theirs), loss)[0],
    )
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value, inputs.logprobs)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    uncorrected = torch.autograd.grad(loss(inputs).loss, inputs.logprobs)[0]
    assert (gradients[0] - uncorrected).abs().max() > 1e-3, "the weights matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_trl(dtype):
    """TRL's formula stands in the middle of a method of 600 lines; this is it, with TRL's own `nanstd`."""
    samples = 8
    rewards = torch.rand(5 * samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    groups = rewards.view(-1, samples)
    centre = rewards - torch.nanmean(groups, dim=1).repeat_interleave(samples)
    for estimator, scale in (
        (GroupAdvantage(), nanstd(groups, dim=1).repeat_interleave(samples) + 1e-4),
        (BatchStdAdvantage(), nanstd(rewards) + 1e-4),
        (GroupMeanAdvantage(), 1.0),
    ):
        torch.testing.assert_close(estimator(rewards, samples), centre / scale, rtol=1e-6, atol=1e-6)

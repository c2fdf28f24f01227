"""Loss, gradient and metrics against the code of TRL's own trainer, called with a stand-in for the trainer."""

import ast
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rounding
import torch
from trl_code import Accelerator, run_statements

from hybrid_lightning import losses
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer.grpo_trainer import GRPOTrainer

B, T, LONGEST = 8, 6, 9
UNUSED = {"use_adaptive_entropy": False, "aux_loss_enabled": False}
UNUSED |= {"vllm_importance_sampling_correction": True}
# TRL's arguments beside ours, pairwise. A spread of 1 reaches the dual clip; else ratios straddle the clip range.
CASES = {
    "plain": {},
    "dual clip": {"spread": 1.0, "dual_clip": 1.5},
    "kl": {"kl_coef": 0.04},
    "kl, bias-corrected, dual clip": {"kl_coef": 0.7, "kl_importance_weight": True, "dual_clip": 1.5, "spread": 1.0},
    "on-policy": {"on_policy": True},
    "on-policy, kl, bias-corrected": {"on_policy": True, "kl_coef": 0.5, "kl_importance_weight": True},
    "entropy, kl, wide": {"entropy_coef": 0.1, "kl_coef": 0.04, "spread": 1.0},
    "off-policy mask, kl": {"off_policy_mask_threshold": 0.05, "kl_coef": 0.04},
}
OF_TOKENS, OF_SEQUENCES = {"clip_low": 0.2, "clip_high": 0.28}, {"clip_low": 3e-4, "clip_high": 4e-4}
# TRL's `loss_type`, and settings. It has no GSPO-token, which is to give what its GSPO gives.
TYPES = {
    losses.GRPOLoss: ("grpo", OF_TOKENS),
    losses.GSPOLoss: ("grpo", OF_SEQUENCES),
    losses.GSPOTokenLoss: ("grpo", OF_SEQUENCES),
    losses.DAPOLoss: ("dapo", OF_TOKENS),
    losses.DrGRPOLoss: ("dr_grpo", OF_TOKENS),
    losses.BNPOLoss: ("bnpo", OF_TOKENS),
    losses.CISPOLoss: ("cispo", {"cap": 1.2}),
    losses.SAPOLoss: ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
}
SPREADS = {cls: 1e-3 if settings is OF_SEQUENCES else 0.3 for cls, (_, settings) in TYPES.items()}
# GSPO-token weighs a KL by the token's ratio, TRL by the sequence's: equal in value, and not in gradient.
LACKING = {losses.GSPOTokenLoss: "kl_importance_weight"} | dict.fromkeys((losses.CISPOLoss, losses.SAPOLoss), "dual_clip")
PAIRS = [  # each in one of two dtypes; every loss and every case has both
    (case, cls, (torch.float64, torch.float32)[(i + j) % 2])
    for i, (case, options) in enumerate(CASES.items())
    for j, cls in enumerate(TYPES)
    if LACKING.get(cls) not in options
]


def make(dtype, seed, spread, on_policy):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[-1] = 0  # a completion that takes no part still counts among the sequences

    added = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.3  # by an environment, or a tool

    def noisy(scale):
        return (logprobs + scale * torch.randn(B, T, generator=generator, dtype=torch.float64)).to(dtype)

    return LossInputs(
        logprobs=logprobs.to(dtype, copy=True).requires_grad_(),
        advantages=torch.randn(B, generator=generator, dtype=torch.float64).to(dtype),
        sampled_mask=(torch.arange(T)[None] < lengths[:, None]) & ~added,
        old_logprobs=None if on_policy else noisy(spread),
        ref_logprobs=noisy(0.3),
        entropy=noisy(0.3).abs().requires_grad_(),
        sampling_logprobs=noisy(0.3),
        max_completion_tokens=float(LONGEST),
    )


def trl_masks(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """Real tokens of completions, up to the last that was sampled; and 0 where a tool added one, 1 elsewhere."""
    real = inputs.sampled_mask.flip(1).cumsum(1).flip(1) > 0
    return {"completion_mask": real.long(), "tool_mask": (inputs.sampled_mask | ~real).long()}


def trl_loss(inputs: LossInputs, loss, accumulation: int = 1, tokens: float | None = None, top_entropy: float = 1.0):
    """`GRPOTrainer._compute_loss` on the same tensors and settings, and the metrics that it logs."""
    arguments = {"use_bias_correction_kl": loss.kl_importance_weight, "delta": getattr(loss, "dual_clip", None)}
    arguments["steps_per_generation"] = accumulation
    for sign in ("positive", "negative"):  # as tensors, since TRL rounds plain numbers to float32, whatever the dtype of the rest
        arguments[f"sapo_temperature_{sign[:3]}"] = inputs.logprobs.new_tensor(getattr(loss, f"tau_{sign}", 1.0))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (inputs.logprobs, inputs.entropy, None),
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        current_gradient_accumulation_steps=accumulation,
        loss_type=TYPES[type(loss)][0],
        importance_sampling_level="sequence" if TYPES[type(loss)][1] is OF_SEQUENCES else "token",
        epsilon_low=getattr(loss, "clip_low", None),
        epsilon_high=loss.cap if isinstance(loss, losses.CISPOLoss) else getattr(loss, "clip_high", None),
        max_completion_length=LONGEST,
        entropy_coef=loss.entropy_coef,
        beta=loss.kl_coef,
        top_entropy_quantile=top_entropy,
        use_vllm=inputs.importance_weights is not None,
        _entropy_bonus_enabled=loss.needs_entropy,
        _metrics={"train": defaultdict(list)},
        off_policy_mask_threshold=loss.off_policy_mask_threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        **UNUSED,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    empty = torch.zeros(len(inputs.advantages), 1, dtype=torch.long)
    batch = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(inputs.sampled_mask, dtype=torch.long),
        **trl_masks(inputs),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logprobs,
        "ref_per_token_logps": inputs.ref_logprobs,
        "importance_sampling_ratio": inputs.importance_weights,
        "sampling_per_token_logps": inputs.sampling_logprobs,
        "num_items_in_batch": inputs.sampled_mask.sum() if tokens is None else torch.tensor(tokens),
    }
    value = GRPOTrainer._compute_loss(trainer, None, batch)
    return value, {name: values[0] for name, values in trainer._metrics["train"].items()}


TIGHT = {"rtol": 1e-12, "atol": 1e-12}
each_loss = pytest.mark.parametrize("cls", TYPES)


def build(cls, **options):
    return cls(**TYPES[cls][1], **options)


def assert_same(inputs, ours, theirs, tolerance=TIGHT):
    """Equal losses with equal gradients; returns the gradient of the log-probabilities."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    leaves = (inputs.logprobs, inputs.entropy)
    gradients = [torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, **tolerance)
    return gradients[0][0]


@pytest.mark.parametrize(("case", "cls", "dtype"), PAIRS)
def test_loss_gradient_and_metrics_equal_trl(case, cls, dtype):
    options = dict(CASES[case])
    inputs = make(dtype, 1, options.pop("spread", SPREADS[cls]), options.pop("on_policy", False))
    loss = build(cls, **options)
    ours, (theirs, their_metrics) = loss(inputs), trl_loss(inputs, loss)
    of_sums = rounding.spread(inputs.sampled_mask.numel())  # over all tokens, of numbers around 1
    tolerance = {"rtol": of_sums, "atol": of_sums} if dtype == torch.float32 else TIGHT
    assert assert_same(inputs, ours.loss, theirs, tolerance).abs().max() > 1e-3
    shared = set(ours.metrics) & set(their_metrics)
    clips = {"cispo_clip_ratio"} if cls is losses.CISPOLoss else {"clip_ratio/low_mean", "clip_ratio/high_mean"}
    if cls is not losses.SAPOLoss:
        assert shared >= clips and (case != "plain" or min(ours.metrics[name] for name in clips) > 0)
    if "dual_clip" in options:
        assert ours.loss < build(cls, **options | {"dual_clip": None})(inputs).loss
    if case == "off-policy mask, kl":
        assert 0 < ours.metrics["off_policy/masked"] < (inputs.advantages < 0).float().mean()
    assert ("kl" in shared) == loss.needs_reference
    for name in shared:
        if cls is not losses.GSPOTokenLoss or "clip" not in name:  # ours are of tokens
            assert ours.metrics[name].item() == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-7), name


def rows_of(inputs, rows, tokens, **counts):
    """Some rows of an optimizer step of B rows, with this many tokens."""
    names = ("logprobs", "advantages", "sampled_mask", "old_logprobs", "ref_logprobs", "sampling_logprobs", "entropy")
    kept = {name: getattr(inputs, name)[rows] for name in names}
    return replace(inputs, **kept, num_sequences=float(B), num_tokens=tokens, **counts)


@each_loss
def test_accumulated_micro_batches_equal_trl(cls):
    inputs = make(torch.float64, 3, SPREADS[cls], False)
    loss, tokens = build(cls, kl_coef=0.1), float(inputs.sampled_mask.sum())
    halves = [rows_of(inputs, rows, tokens, num_micro_batches=2.0) for rows in (slice(0, B // 2), slice(B // 2, B))]
    ours = sum(loss(half).loss for half in halves)
    assert_same(inputs, ours, sum(trl_loss(half, loss, 2, tokens)[0] for half in halves))


@each_loss
def test_masked_truncated_completions_equal_trl(cls):
    """TRL empties the mask of their rows; here the rows are left out, and count among the sequences alone."""
    inputs, loss = make(torch.float64, 5, SPREADS[cls], False), build(cls, kl_coef=0.1)
    finished = torch.tensor([True, False, True, True, False, True, True, True])
    masked = replace(inputs, sampled_mask=inputs.sampled_mask & finished[:, None])
    kept = rows_of(inputs, finished, float(masked.sampled_mask.sum()))
    assert_same(inputs, loss(kept).loss, trl_loss(masked, loss)[0])
    assert not torch.allclose(loss(masked).loss, loss(inputs).loss)


@pytest.mark.parametrize("cls", [cls for cls in TYPES if cls is not losses.GSPOTokenLoss])  # which parts from GSPO here
def test_the_top_entropy_mask_equals_trl(cls):
    share, options = (0.5, {"kl_coef": 0.1}) if cls in (losses.GSPOLoss, losses.BNPOLoss) else (0.2, {})
    inputs, loss = make(torch.float64, 6, SPREADS[cls], False), build(cls, **options)
    mask = inputs.sampled_mask
    kept = mask & (inputs.entropy.detach() >= losses.TopEntropyMask(share).threshold(inputs.entropy.detach()[mask].float()))
    weights = kept.to(torch.float64)
    weighted = loss(replace(inputs, importance_weights=weights)).loss
    gradient = assert_same(inputs, weighted, trl_loss(inputs, loss, top_entropy=share)[0])
    if cls is not losses.GSPOLoss and not options:
        # Those above the quantile, which of 16 tokens and a share of 0.2 are three, and the one at it.
        assert (gradient[~kept] == 0).all() and kept.sum() == int(share * (mask.sum() - 1)) + 1


MODES = {
    losses.TokenTruncation: "token_truncate",
    losses.TokenMask: "token_mask",
    losses.SequenceTruncation: "sequence_truncate",
    losses.SequenceMask: "sequence_mask",
}


def trl_weights(inputs, sampling_logprobs, mode, cap, floor):
    """TRL computes them in the middle of a method of 600 lines: run that `if` alone."""
    given = {"correction": True, "mode": mode, "clip_max": cap, "clip_min": floor}
    trainer = SimpleNamespace(use_vllm=True, **{f"vllm_importance_sampling_{name}": value for name, value in given.items()})

    def wanted(node):
        if not isinstance(node, ast.If) or "self.vllm_importance_sampling_correction" not in ast.unparse(node.test):
            return False
        return any("vllm_importance_sampling_ratio" in ast.unparse(statement).split(" = ")[0] for statement in node.body)

    return run_statements(
        GRPOTrainer._generate_and_score_completions,
        wanted,
        self=trainer,
        torch=torch,
        math=math,
        **trl_masks(inputs),
        old_per_token_logps=inputs.old_logprobs,
        sampling_per_token_logps=sampling_logprobs,
    )["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize(
    ("correction", "cls", "options", "bounds"),
    [
        (losses.TokenTruncation, losses.GRPOLoss, {"kl_coef": 0.5, "kl_importance_weight": True}, {"cap": 1.1}),
        (losses.TokenMask, losses.CISPOLoss, {"kl_coef": 0.04}, {"cap": 1.1, "floor": 0.8}),
        (losses.SequenceTruncation, losses.GSPOLoss, {}, {"cap": 1.1, "floor": 0.8}),
        (losses.SequenceMask, losses.GRPOLoss, {"kl_coef": 0.04}, {"cap": 1.1, "floor": 0.8}),
        (losses.TokenTruncation, losses.GSPOLoss, {"kl_coef": 0.04}, {"cap": 1.1, "floor": 0.8}),
    ],
)
def test_corrected_loss_and_gradient_equal_trl(correction, cls, options, bounds):
    inputs = make(torch.float64, 4, SPREADS[cls], False)
    noise = torch.randn(B, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampling_logprobs = inputs.old_logprobs + 0.1 * noise
    mask, loss = inputs.sampled_mask, build(cls, **options)
    weights = F.per_token(correction(**bounds)(inputs.old_logprobs, sampling_logprobs, mask), mask)
    theirs = trl_weights(inputs, sampling_logprobs, MODES[correction], bounds["cap"], bounds.get("floor")).expand(B, T)
    torch.testing.assert_close(weights[mask], theirs[mask], rtol=1e-12, atol=0)
    assert len(weights[mask].unique()) > 2 and {0.0, 1.1} & set(weights[mask].tolist())
    ours = loss(replace(inputs, importance_weights=weights))
    gradient = assert_same(inputs, ours.loss, trl_loss(replace(inputs, importance_weights=theirs), loss)[0])
    assert ours.metrics == loss(inputs).metrics
    uncorrected = torch.autograd.grad(loss(inputs).loss, inputs.logprobs)[0]
    assert (gradient - uncorrected).abs().max() > 1e-3, "the weights matter"

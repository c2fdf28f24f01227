"""GRPO and GSPO once more, number by number in Python loops, straight from the equations; and random inputs for both."""

import math

import torch

from hybrid_lightning.types import LossInputs

CLIPS = (0.02, 0.03)  # a range that both GRPOLoss and GSPOLoss accept


def make_inputs(
    seed: int = 0, b: int = 6, t: int = 5, spread: float = 0.1, dtype: torch.dtype = torch.float64, full: bool = False
) -> LossInputs:
    """Random inputs with completions of 1 to T tokens (`full`: T), old and reference log-probabilities `spread` away."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.full((b,), t) if full else torch.randint(1, t + 1, (b,), generator=generator)
    logprobs = -normal(b, t).abs() - 0.1
    old, ref = logprobs + spread * normal(b, t), logprobs + 3 * spread * normal(b, t)
    return LossInputs(
        logprobs=logprobs.to(dtype).requires_grad_(),
        advantages=normal(b).to(dtype),
        completion_mask=torch.arange(t)[None, :] < lengths[:, None],
        old_logprobs=old.to(dtype),
        ref_logprobs=ref.to(dtype),
    )


def scalar_loss(
    inputs: LossInputs,
    *,
    sequence_level: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_importance_weight: bool = False,
) -> dict[str, float]:
    """Loss, clip ratios, KL and ratio statistics."""
    rows = [
        (
            inputs.advantages[i].item(),
            [
                (inputs.logprobs[i, t].item(), inputs.old_logprobs[i, t].item(), inputs.ref_logprobs[i, t].item())
                for t in range(inputs.completion_mask.shape[1])
                if inputs.completion_mask[i, t]
            ],
        )
        for i in range(len(inputs.advantages))
    ]
    loss, kls, ratios = 0.0, [], []
    for advantage, tokens in rows:
        of_sequence = math.exp(sum(new - old for new, old, _ in tokens) / len(tokens))
        row = 0.0
        for new, old, ref in tokens:
            ratio = of_sequence if sequence_level else math.exp(new - old)
            bounded = ratio if dual_clip is None else min(ratio, dual_clip)
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            kl = (math.exp(ref - new) - (ref - new) - 1) * (ratio if kl_importance_weight else 1.0)
            kls.append(kl)
            row += -min(bounded * advantage, clipped * advantage) + kl_coef * kl
            if not sequence_level:
                ratios.append((ratio, advantage))
        if sequence_level:
            ratios.append((of_sequence, advantage))
        loss += row / len(tokens)
    low = [ratio < 1 - clip_low and advantage < 0 for ratio, advantage in ratios]
    high = [ratio > 1 + clip_high and advantage > 0 for ratio, advantage in ratios]
    return {
        "loss": loss / len(rows),
        "kl": sum(kls) / len(kls),
        "clip_ratio/low_mean": sum(low) / len(ratios),
        "clip_ratio/high_mean": sum(high) / len(ratios),
        "clip_ratio/region_mean": (sum(low) + sum(high)) / len(ratios),
        "ratio/mean": sum(ratio for ratio, _ in ratios) / len(ratios),
        "ratio/max": max(ratio for ratio, _ in ratios),
    }

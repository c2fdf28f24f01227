"""Every loss once more, number by number in Python loops, straight from the equations; and random inputs for them."""

import math

import torch

from hybrid_lightning import losses
from hybrid_lightning.types import LossInputs

CLIPS = (0.02, 0.03)  # a range that losses over ratios of tokens and of sequences both accept
CLIPPED = [losses.GRPOLoss, losses.GSPOLoss, losses.GSPOTokenLoss, losses.DAPOLoss, losses.DrGRPOLoss, losses.BNPOLoss]
# Each loss with settings that random inputs reach.
SETTINGS = {
    **{cls: dict(zip(("clip_low", "clip_high"), CLIPS, strict=True)) for cls in CLIPPED},
    losses.CISPOLoss: {"cap": 1.1},
    losses.SAPOLoss: {},
    losses.DPPOLoss: {"mask_low": 0.02, "mask_high": 0.03, "log_ratio_coef": 0.1},
}


def make_inputs(seed=0, b=6, t=5, spread=0.1, dtype=torch.float64, full=False) -> LossInputs:
    """Random inputs of completions of 1 to T tokens, with old and reference log-probabilities `spread` away.

    About two in three tokens of a completion were sampled, but at least one. With `full`, all completions have T sampled tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.full((b,), t) if full else torch.randint(1, t + 1, (b,), generator=generator)
    logprobs = -normal(b, t).abs() - 0.1
    old, ref = logprobs + spread * normal(b, t), logprobs + 3 * spread * normal(b, t)
    advantages, entropy = normal(b).to(dtype), normal(b, t).abs().to(dtype).requires_grad_()
    sampled = torch.rand(b, t, generator=generator) > (-1 if full else 1 / 3)
    sampled[torch.arange(b), lengths - 1] = True
    of_sampler = 0.3 * spread * torch.randn(b, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs.to(dtype).requires_grad_(),
        advantages=advantages,
        sampled_mask=sampled & (torch.arange(t)[None, :] < lengths[:, None]),
        old_logprobs=old.to(dtype),
        ref_logprobs=ref.to(dtype),
        sampling_logprobs=(old + of_sampler).to(dtype),
        entropy=entropy,
        max_completion_tokens=t + 2.0,
    )


def scalar_loss(inputs: LossInputs, loss: losses.PolicyLoss) -> dict[str, float]:
    """Loss and metrics of all these rows as one optimizer step of one micro-batch."""
    fields = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "sampling_logprobs")
    by_token, off_policy = inputs.advantages.dim() == 2, []
    rows = [
        [
            (*(getattr(inputs, name)[i, t].item() for name in fields), inputs.advantages[(i, t) if by_token else i].item())
            for t in range(inputs.sampled_mask.shape[1])
            if inputs.sampled_mask[i, t]
        ]
        for i in range(len(inputs.advantages))
    ]
    sums, kls, ratios, entropies, moves, of_moves = [], [], [], [], [], isinstance(loss, losses.DPPOLoss)
    weights = [1.0] * len(rows) if inputs.row_weights is None else inputs.row_weights.tolist()
    for tokens, weight in zip(rows, weights, strict=True):
        of_sequence = math.exp(sum(new - old for new, old, *_ in tokens) / len(tokens))
        row, divergence = 0.0, sum(sampled - new for new, *_, sampled, _ in tokens) / len(tokens)
        for new, old, ref, entropy, _, advantage in tokens:
            ratio = of_sequence if isinstance(loss, (losses.GSPOLoss, losses.GSPOTokenLoss)) else math.exp(new - old)
            kl = (math.exp(ref - new) - (ref - new) - 1) * (ratio if loss.kl_importance_weight else 1.0)
            kls.append(kl)
            entropies.append(entropy)
            left_out = advantage < 0 and divergence > (loss.off_policy_mask_threshold or math.inf)
            off_policy.append((left_out, 1 if by_token else weight / len(tokens)))
            row += (0.0 if left_out else token_loss(loss, ratio, advantage, new)) + loss.kl_coef * kl
            moves += [(math.exp(new) - math.exp(old), advantage, 1.0)] * of_moves
            if not isinstance(loss, losses.GSPOLoss):
                ratios.append((ratio, advantage, 1.0))
        if isinstance(loss, losses.GSPOLoss):
            ratios.append((of_sequence, advantage, weight))
        sums.append((row, len(tokens), weight))
    every = sum(weight for *_, weight in ratios)
    value = reduce_rows(loss, sums, inputs.max_completion_tokens) - loss.entropy_coef * sum(entropies) / len(entropies)
    result = {
        "loss": value,
        "ratio/mean": sum(ratio * weight for ratio, _, weight in ratios) / every,
        "ratio/max": max(ratio for ratio, *_ in ratios),
    }
    if loss.kl_coef:
        result["kl"] = sum(kls) / len(kls)
    if loss.off_policy_mask_threshold:
        result["off_policy/masked"] = sum(left * part for left, part in off_policy) / sum(part for _, part in off_policy)
    if isinstance(loss, losses.CISPOLoss):
        result["cispo_clip_ratio"] = sum(ratio > loss.cap and advantage > 0 for ratio, advantage, _ in ratios) / every
    elif not isinstance(loss, losses.SAPOLoss):
        least, most = (-loss.mask_low, loss.mask_high) if of_moves else (1 - loss.clip_low, 1 + loss.clip_high)
        low = sum(weight for value, advantage, weight in moves or ratios if value < least and advantage < 0) / every
        high = sum(weight for value, advantage, weight in moves or ratios if value > most and advantage > 0) / every
        result |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    return result


def token_loss(loss: losses.PolicyLoss, ratio: float, advantage: float, logprob: float) -> float:
    """The policy term of one token."""
    if isinstance(loss, losses.CISPOLoss):
        return -min(ratio, loss.cap) * advantage * logprob
    if isinstance(loss, losses.SAPOLoss):
        tau = loss.tau_positive if advantage > 0 else loss.tau_negative
        return -advantage * (4 / tau) / (1 + math.exp(-tau * (ratio - 1)))
    if isinstance(loss, losses.DPPOLoss):
        moved = math.exp(logprob) * (1 - 1 / ratio)
        masked = moved > loss.mask_high if advantage > 0 else moved < -loss.mask_low
        return -(not masked) * ratio * advantage + loss.log_ratio_coef * math.log(ratio) ** 2
    bounded = ratio if loss.dual_clip is None else min(ratio, loss.dual_clip)
    clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    return -min(bounded * advantage, clipped * advantage)


def reduce_rows(loss: losses.PolicyLoss, rows: list[tuple[float, int, float]], max_tokens: float) -> float:
    """The loss of rows, each given as the sum over its tokens, their number, and its share of an episode."""
    episodes = sum(weight for *_, weight in rows)
    if isinstance(loss, (losses.DAPOLoss, losses.CISPOLoss, losses.BNPOLoss, losses.DPPOLoss)):
        return sum(row for row, *_ in rows) / sum(length for _, length, _ in rows)
    if isinstance(loss, losses.DrGRPOLoss):
        return sum(row for row, *_ in rows) / (episodes * max_tokens)
    return sum(row / length * weight for row, length, weight in rows) / episodes

"""The oracle: known results come out, and every loss gives on average what its formula gives, summed by hand over all rollouts.

The formulas below are written from the papers, once for all losses. A change of a sign, mask, denominator or ratio in the package
makes them differ.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.oracle import __main__ as command
from benchmarks.oracle.estimators import Probabilities, Rows, of_function, of_own_path, trl_loss
from benchmarks.oracle.sweep import ADVANTAGES, CORRECTIONS, LOSSES, SAMPLES, Situation, _advantage, _correction
from benchmarks.oracle.world import Estimate, Rollouts, answers, mean_gradient
from hybrid_lightning import losses

STEPS = ("first", "later")
PAGE = Path(__file__).parents[2] / "docs/how-to/prove-an-estimator.md"


def situation(rewards="graded", policy="logits", samples=2, cache={}):  # noqa: B006
    """Made once: two completions of each prompt, 784 rollouts."""
    key = (rewards, policy, samples)
    if key not in cache:
        cache[key] = Situation(policy, rewards, samples)
    return cache[key]


def made(here, advantage, mask=False, cache={}):  # noqa: B006
    key = (id(here), advantage, mask)
    if key not in cache:
        cache[key] = Rows.of(here.language, here.rollouts, _advantage(advantage), mask)
    return cache[key]


def mean(here, of_tokens, lag):
    return mean_gradient(of_tokens, here.rollouts.chances(here.past[lag]), here.rollouts, here.past[lag].shape)


def own(here, loss, advantage="LeaveOneOut", correction=None, lag=0, step="first", mask=False):
    """The package's mean gradient by the log-probability of each token, [P, N, T]."""
    return mean(here, of_own_path(made(here, advantage, mask), loss, here.given(lag, step), correction, ahead=lag > 0), lag)


# ---- The formulas, on all ordered rollouts: M = 7 ** 4 of two prompts and two completions each


def formula_advantages(name, language, chosen):
    """[M, P, G]."""
    of_prompt = torch.arange(2)[:, None]
    rewards = language.rewards[of_prompt, chosen]
    centred, eps, flat = rewards - rewards.mean(dim=2, keepdim=True), 1e-4, (-1, 4)
    if name == "GroupMean":
        return centred
    if name == "LeaveOneOut":
        return rewards - rewards.flip(2)  # the other one is the mean of the others
    if name == "Group":
        return centred / (rewards.std(dim=2, keepdim=True) + eps)
    if name == "BatchStd":
        return centred / (rewards.reshape(flat).std(dim=1) + eps)[:, None, None]
    if name == "ReinforcePlusPlus":
        return centred / (centred.reshape(flat).std(dim=1) + eps)[:, None, None]
    total = torch.zeros_like(rewards)
    for part, values in language.parts.items():
        of_part = values[of_prompt, chosen]
        total = total + language.weights[part] * (of_part - of_part.mean(dim=2, keepdim=True)) / (
            of_part.std(dim=2, keepdim=True) + eps
        )
    return total / (total.reshape(flat).std(dim=1) + eps)[:, None, None]


def formula_weights(name, current, sampling, mask):
    """Weights of tokens, [M, B, T], from the policy before the rollout's steps and the sampler."""
    log_ratio = (current - sampling) * mask
    ratio = (log_ratio.sum(dim=-1, keepdim=True) if name.startswith("Sequence") else log_ratio).exp()
    return ratio.clamp(max=2.0) if name.endswith("Truncation") else torch.where(ratio > 2.0, 0.0, ratio)


def formula_loss(name, logprobs, old, mask, advantages, weights, longest):
    """Losses of M optimizer steps, [M]: each sums its B rows and T tokens."""
    lengths, tokens, rows = mask.sum(dim=-1, keepdim=True), mask.sum(dim=(1, 2)), mask.shape[1]
    ratio = ((logprobs - old) * mask).exp()
    low, high = {"DAPO": (0.2, 0.28), "GSPO": (3e-4, 4e-4), "GSPOToken": (3e-4, 4e-4)}.get(name, (0.2, 0.2))
    if name.startswith("GSPO"):
        sequence = (((logprobs - old) * mask).sum(dim=-1, keepdim=True) / lengths).exp()
        ratio = sequence if name == "GSPO" else sequence.detach() * (logprobs - logprobs.detach()).exp()
    if name == "CISPO":
        surrogate = ratio.detach().clamp(max=5.0) * advantages * logprobs
    elif name == "SAPO":
        tau = torch.where(advantages > 0, 1.0, torch.tensor(1.05, dtype=torch.float64))
        surrogate = advantages * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
    elif name == "DPPO":
        moved = (logprobs.exp() - old.exp()).detach()
        surrogate = torch.where(torch.where(advantages > 0, moved <= 0.2, moved >= -0.2), ratio * advantages, 0.0)
    else:
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    of_tokens = surrogate * weights * mask
    if name in ("DAPO", "CISPO", "DPPO", "BNPO"):
        return -of_tokens.sum(dim=(1, 2)) / tokens
    if name == "DrGRPO":
        return -of_tokens.sum(dim=(1, 2)) / (rows * longest)
    return -(of_tokens / lengths).sum(dim=(1, 2)) / rows


def formula(here, loss, advantage, correction, lag, step):
    """The mean gradient by the log-probability of each token, [P, N, T]."""
    language, of_prompt = here.language, torch.arange(2)[:, None]
    chosen = torch.tensor(list(itertools.product(range(len(language.texts)), repeat=4))).view(-1, 2, 2)
    chances = here.past[lag].sum(dim=2)[of_prompt, chosen].sum(dim=(1, 2)).exp()
    current = here.logprobs[step].clone().requires_grad_()
    old = here.past[lag] if lag and correction == "none" else here.past[0]  # without a correction ratios are to the sampler
    rows = [values[of_prompt, chosen].flatten(1, 2) for values in (current, old, here.past[0], here.past[lag])]
    mask = language.mask[chosen].flatten(1, 2)
    advantages = formula_advantages(advantage, language, chosen).flatten(1, 2)[:, :, None]
    weights = torch.ones(()) if correction == "none" else formula_weights(correction, rows[2], rows[3], mask)
    value = formula_loss(loss, rows[0], rows[1], mask, advantages, weights, language.longest)
    (found,) = torch.autograd.grad((value * chances).sum(), current)
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_loss_is_its_formula(loss, correction):
    here = situation()
    made_correction = None if correction == "none" else _correction(correction)
    for lag, step in itertools.product((0, 4) if correction == "none" else (4,), STEPS):
        found = own(here, LOSSES[loss](), "Group", made_correction, lag, step)
        torch.testing.assert_close(found, formula(here, loss, "Group", correction, lag, step), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_an_advantage_is_its_formula(advantage):
    for rewards in ("binary", "graded"):
        here = situation(rewards)
        torch.testing.assert_close(
            own(here, losses.DrGRPOLoss(), advantage),
            formula(here, "DrGRPO", advantage, "none", 0, "first"),
            rtol=1e-9,
            atol=1e-12,
        )


# ---- Known results


@pytest.mark.parametrize("policy", ["logits", "transformer"])
@pytest.mark.parametrize("rewards", ["binary", "graded"])
def test_leave_one_out_is_unbiased_and_the_group_mean_short_by_a_factor(policy, rewards):
    here = situation(rewards, policy, 3)
    for advantage, factor in (("LeaveOneOut", 1.0), ("GroupMean", 2 / 3)):
        line = here.own("DrGRPO", made(here, advantage), 0, "first", advantage=advantage)
        assert line.estimate.angle < 1e-9 and line.estimate.length == pytest.approx(factor / here.language.longest, rel=1e-12)


def test_division_by_the_deviation_weighs_prompts_by_their_difficulty():
    """With rewards of 0 and 1 the mean gradient of a prompt is its true one times a factor of its success rate."""
    here = situation("binary", samples=SAMPLES)
    found, logprobs = own(here, losses.DrGRPOLoss(), "Group"), here.past[0]
    rates = (logprobs.sum(dim=2).exp() * here.language.rewards).sum(dim=1)
    expected = []
    for rate in rates.tolist():
        weights = [math.comb(4, k) * rate**k * (1 - rate) ** (4 - k) for k in range(5)]
        spread = [k * (4 - k) / 4 for k in range(5)]
        deviation = [math.sqrt(k * (4 - k) / 12) + 1e-4 for k in range(5)]
        expected.append(sum(w * s / d for w, s, d in zip(weights, spread, deviation, strict=True)) / (4 * rate * (1 - rate)))
    unbiased = own(here, losses.DrGRPOLoss(), "LeaveOneOut")
    jacobian = here.truth["first"][0]  # gradients by tokens are defined up to a constant of each state
    for prompt in range(2):
        pulled = [torch.einsum("nt,ntd->d", values[prompt], jacobian[prompt]) for values in (found, unbiased)]
        torch.testing.assert_close(pulled[0], expected[prompt] * pulled[1], rtol=1e-9, atol=1e-12)
    assert abs(expected[0] / expected[1] - 1) > 0.01  # so the sum over prompts has another direction


def test_division_by_lengths_weighs_short_completions_more():
    """A completion's share of the gradient is divided by its own length and nothing else."""
    here = situation("binary")
    of_tokens = of_own_path(made(here, "LeaveOneOut"), losses.GRPOLoss(), here.given(0, "first"))
    whole = of_own_path(made(here, "LeaveOneOut"), losses.DrGRPOLoss(), here.given(0, "first"))
    lengths = here.language.lengths[here.rollouts.chosen][..., None]
    torch.testing.assert_close(of_tokens, whole * here.language.longest / lengths)
    assert here.own("GRPO", made(here, "LeaveOneOut"), 0, "first", advantage="LeaveOneOut").estimate.angle > 5


def test_clipping_begins_with_the_second_step():
    here = situation("binary")
    for loss, wide in ((losses.GRPOLoss(), losses.GRPOLoss(0.9, 9.0)), (losses.GSPOLoss(), losses.GSPOLoss(0.09, 0.09))):
        assert torch.equal(own(here, loss), own(here, wide))
        assert not torch.allclose(own(here, loss, step="later"), own(here, wide, step="later"), atol=1e-3)


def test_on_policy_losses_differ_only_by_their_denominators():
    here = situation("graded")
    for first, *others in (("GRPO", "GSPO", "GSPOToken", "SAPO"), ("DAPO", "CISPO", "DPPO", "BNPO")):
        for other in others:
            torch.testing.assert_close(own(here, LOSSES[first]()), own(here, LOSSES[other]()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("policy", ["logits", "transformer"])
def test_a_lag_without_and_with_each_correction(policy):
    """Only the ratio of the whole sequence, unbounded, removes the bias of a lag."""
    here, angles = situation("binary", policy), {}
    unbounded = {name: getattr(losses, name)(cap=1e9) for name in CORRECTIONS[1:]}
    for name, correction in {"none": None, **unbounded}.items():
        of_tokens = of_own_path(made(here, "LeaveOneOut"), losses.DrGRPOLoss(), here.given(4, "first"), correction, ahead=True)
        angles[name] = here.line(of_tokens, 4, "first", loss="DrGRPO", advantage="LeaveOneOut").estimate
    for name in ("SequenceTruncation", "SequenceMask"):
        assert angles[name].angle < 1e-9 and angles[name].length == pytest.approx(1 / 3, rel=1e-9)
    for name in ("TokenTruncation", "TokenMask"):
        assert 0.1 < angles[name].angle < angles["none"].angle


def test_completions_that_do_not_count():
    """Without the episodes that fail, leave-one-out estimates the reward of the others, but for the groups of one."""
    here = situation("failures", samples=SAMPLES)
    rows = made(here, "LeaveOneOut")
    failed = here.language.failed[here.rollouts.chosen]
    assert (of_own_path(rows, losses.DrGRPOLoss(), here.given(0, "first"))[failed] == 0).all()
    line = here.own("DrGRPO", rows, 0, "first", advantage="LeaveOneOut")
    assert 0 < line.estimate.angle < 5
    masked = of_own_path(made(situation("binary"), "Group", True), losses.DAPOLoss(), situation("binary").given(0, "first"))
    cut = situation("binary").language.cut[situation("binary").rollouts.chosen]
    assert (masked[cut] == 0).all() and (masked[~cut] != 0).any()


def test_estimates_of_a_known_case():
    """Mean, direction, noise and sign of two rollouts with chances of a quarter and three quarters, by hand."""
    rollouts = Rollouts(torch.tensor([[[0]], [[1]]]), torch.ones(2, dtype=torch.float64))
    jacobian = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
    of_tokens = -torch.tensor([4.0, 4.0], dtype=torch.float64).view(2, 1, 1, 1)  # gradients (4, 0) and (0, 4)
    found = Estimate.of(of_tokens, torch.tensor([0.25, 0.75]).double(), rollouts, jacobian, torch.tensor([1.0, -1.0]).double())
    assert found.angle == pytest.approx(180 - math.degrees(math.acos(2 / math.sqrt(20))))  # mean (1, 3)
    assert found.length == pytest.approx(math.sqrt(5)) and found.wrong_sign == pytest.approx(0.75)
    assert found.noise == pytest.approx(math.sqrt(16 - 10) / math.sqrt(10))
    assert len(Rollouts.of(answers(), 2).chosen) == 28**2


TRL = {"grpo": "GRPO", "dapo": "DAPO", "dr_grpo": "DrGRPO", "bnpo": "BNPO", "gspo": "GSPO", "cispo": "CISPO", "sapo": "SAPO"}


@pytest.mark.parametrize("loss_type", TRL)
def test_trl_gives_the_same(loss_type):
    pytest.importorskip("trl")
    here, name = situation("graded"), TRL[loss_type]
    loss = losses.DAPOLoss(0.2, 0.28) if name == "DAPO" else LOSSES[name]()
    settings = {"epsilon_high": 0.28} if name == "DAPO" else {}
    given = here.given(0, "later")
    theirs = of_function(trl_loss(loss_type, **settings), here.language, here.rollouts, given)
    torch.testing.assert_close(theirs, of_own_path(made(here, "Group"), loss, given), rtol=1e-9, atol=1e-12)


def test_a_loss_from_a_file(tmp_path, capsys):
    (code,) = re.findall(r"^<!-- run: estimator -->\n```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    file = tmp_path / "mine.py"
    file.write_text(code)
    assert command.main(["--loss", f"{file}:loss", "--samples", "2"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| loss |" in line][1:]
    on_policy = [cells for cells in lines if cells[3] == "lag 0, first"]
    assert len(lines) == 9 and len(on_policy) == 3 and all(cells[4:6] == ["0", "1"] for cells in on_policy)
    assert all(float(cells[4]) > 1 for cells in lines if cells not in on_policy)
    file.write_text(
        f"from hybrid_lightning.losses import DrGRPOLoss\nclass Mine(DrGRPOLoss): ...\n{file.read_text()}    return step.mask\n"
    )
    assert command.main(["--loss", f"{file}:Mine", "--samples", "2"]) == 0
    found = [line.split(" | ")[3:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(found) == 18 and found[::2] == found[1::2]
    file.write_text(file.read_text().replace("    return -of", "    -of"))
    for place, expected in (
        (f"{file}:loss", "a loss must return a tensor of one number"),
        (f"{file}:los", "has no function los; it defines Mine, loss"),
        ("mine:loss", "give FILE.py:FUNCTION"),
    ):
        assert command.main(["--loss", place]) == 2 and expected in capsys.readouterr().err
    assert Probabilities(*[torch.zeros(1)] * 3).on_policy

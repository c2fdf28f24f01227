"""Advantages against TRL's formulas, which are inside methods of hundreds of lines: only these statements run."""

import ast
from types import SimpleNamespace

import pytest
import torch
from trl_code import run_statements

from hybrid_lightning import advantages
from hybrid_lightning.types import Rewards

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer import grpo_trainer, rloo_trainer

SAMPLES = 8
WEIGHTS = {"right": 1.0, "short": 0.5, "polite": -0.2}
CASES = [
    (advantages.GroupAdvantage(), "sum_then_normalize", "group", torch.float32),
    (advantages.BatchStdAdvantage(), "sum_then_normalize", "batch", torch.float64),
    (advantages.GroupMeanAdvantage(), "sum_then_normalize", "none", torch.float32),
    (advantages.PerRewardAdvantage(), "normalize_then_sum", "group", torch.float32),
    (advantages.PerRewardAdvantage(), "normalize_then_sum", "group", torch.float64),
]


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(2, (5 * SAMPLES,), generator=generator).to(dtype)
    right[:SAMPLES] = 1.0  # a group with tied rewards in one part
    parts = {"right": right, **{name: torch.rand(5 * SAMPLES, generator=generator, dtype=dtype) for name in ("short", "polite")}}
    total = sum(WEIGHTS[name] * part for name, part in parts.items())
    return Rewards(total, parts, right >= 1, WEIGHTS).apply(lambda values: values.view(-1, SAMPLES))


@pytest.mark.parametrize(("estimator", "aggregation", "scale", "dtype"), CASES)
def test_advantages_equal_trl(estimator, aggregation, scale, dtype):
    rewards, weights = make(dtype), torch.tensor(list(WEIGHTS.values()), dtype=dtype)
    rows = torch.stack([part.flatten() for part in rewards.parts.values()], dim=1)
    settings = {"multi_objective_aggregation": aggregation, "scale_rewards": scale}
    names = run_statements(
        grpo_trainer.GRPOTrainer._generate_and_score_completions,
        lambda node: isinstance(node, ast.If) and ast.unparse(node.test).startswith("self.multi_objective_aggregation == 'sum_"),
        self=SimpleNamespace(**settings, reward_weights=weights, reward_funcs=list(WEIGHTS)),
        torch=torch,
        nanstd=grpo_trainer.nanstd,
        rewards_per_func=rows,
        unscorable_mask=torch.zeros(len(rows), dtype=torch.bool),
        num_generations=SAMPLES,
        device="cpu",
    )
    # In float64 too: TRL's `nanstd` rounds n / (n - 1) to float32.
    torch.testing.assert_close(estimator.of_rewards(rewards).flatten(), names["advantages"], rtol=1e-6, atol=1e-6)


def test_leave_one_out_equals_trl():
    rewards = make(torch.float64).total

    def wanted(node):
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0]) in ("grouped_rewards", "scorable_counts", "grouped_sum")
        return isinstance(node, ast.If) and "baselines = " in ast.unparse(node.body)

    method = rloo_trainer.RLOOTrainer._generate_and_score_completions
    names = run_statements(method, wanted, torch=torch, rewards=rewards.flatten(), num_generations=SAMPLES)
    found = advantages.LeaveOneOutAdvantage()(rewards).flatten()
    torch.testing.assert_close(found, names["advantages"], rtol=1e-10, atol=1e-10)

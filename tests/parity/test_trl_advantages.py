"""Advantages against TRL's formulas, which stand within methods of hundreds of lines: those statements are run alone."""

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from hybrid_lightning.advantages import (
    BatchStdAdvantage,
    GroupAdvantage,
    GroupMeanAdvantage,
    LeaveOneOutAdvantage,
    PerRewardAdvantage,
)
from hybrid_lightning.types import Rewards

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer import grpo_trainer, rloo_trainer

SAMPLES = 8
WEIGHTS = {"right": 1.0, "short": 0.5, "polite": -0.2}
CASES = {
    "group": (GroupAdvantage(), "sum_then_normalize", "group"),
    "batch": (BatchStdAdvantage(), "sum_then_normalize", "batch"),
    "none": (GroupMeanAdvantage(), "sum_then_normalize", "none"),
    "per reward": (PerRewardAdvantage(), "normalize_then_sum", "group"),
}


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(2, (5 * SAMPLES,), generator=generator).to(dtype)
    right[:SAMPLES] = 1.0  # a group whose rewards tie in one part
    parts = {"right": right, **{name: torch.rand(5 * SAMPLES, generator=generator, dtype=dtype) for name in ("short", "polite")}}
    total = sum(WEIGHTS[name] * part for name, part in parts.items())
    return Rewards(total, parts, right >= 1, WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_advantages_equal_trl(case, dtype):
    estimator, aggregation, scale = CASES[case]
    rewards = make(dtype)
    source = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    (block,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    ]
    rows = torch.stack(list(rewards.parts.values()), dim=1)
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=torch.tensor(list(WEIGHTS.values()), dtype=dtype),
            reward_funcs=list(WEIGHTS),
        ),
        "torch": torch,
        "nanstd": grpo_trainer.nanstd,
        "rewards_per_func": rows,
        "unscorable_mask": torch.zeros(len(rows), dtype=torch.bool),
        "num_generations": SAMPLES,
        "device": "cpu",
    }
    exec(compile(ast.Module([block], []), "trl", "exec"), names)
    # In float64 too: TRL's `nanstd` rounds n / (n - 1) to float32.
    torch.testing.assert_close(estimator.of_rewards(rewards, SAMPLES), names["advantages"], rtol=1e-6, atol=1e-6)


def test_leave_one_out_equals_trl():
    rewards = make(torch.float64).total
    source = textwrap.dedent(inspect.getsource(rloo_trainer.RLOOTrainer._generate_and_score_completions))
    statements = [
        node
        for node in ast.walk(ast.parse(source))
        if (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("grouped_rewards", "scorable_counts", "grouped_sum")
        )
        or (isinstance(node, ast.If) and "baselines = " in ast.unparse(node.body))
    ]
    names = {"torch": torch, "rewards": rewards, "num_generations": SAMPLES}
    exec(compile(ast.Module(statements, []), "trl", "exec"), names)
    torch.testing.assert_close(LeaveOneOutAdvantage()(rewards, SAMPLES), names["advantages"], rtol=1e-10, atol=1e-10)

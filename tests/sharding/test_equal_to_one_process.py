"""On two ranks, a run has the plan, losses, metrics, weights and validation of one process."""

from pathlib import Path

import pytest
import torch
from fake_judge import FakeJudge, graded
from lightning.pytorch import Callback
from runs_of_tests import ADAM, STRATEGIES, ByPrompt, Only, Streamed, assert_same_run
from tiny_runs import DigitShare, Failing, OftenDone, Rewritten, Talk, write_model
from torch.distributed.tensor import DTensor

from hybrid_lightning.adapters import TailEnergy
from hybrid_lightning.advantages import BatchStdAdvantage, NoAdvantage
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.losses import DAPOLoss, GRPOLoss, ReverseKL, TokenTruncation, TopEntropyMask
from hybrid_lightning.rewards import JudgeReward, WeightedSum
from hybrid_lightning.rollout import DynamicSampling
from hybrid_lightning.shared.reply_cache import ReplyCache
from hybrid_lightning.training import ModelTeacher, SelfTeacher


class Sizes(Callback):
    """Numbers that a rank holds of weights and gradients before an optimizer step, and of the optimizer's state after it."""

    def __init__(self):
        self.held = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for p in pl_module.model.parameters() if p.numel()]
        self.held["weights"] = sum(local(p).numel() for p in parameters)
        self.held["gradients"] = sum(local(p.grad).numel() for p in parameters if p.grad is not None)

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        self.held["state"] = sum(local(value).numel() for value in state)


class Ungraded(Callback):
    """Replies of the run's judge are kept in a folder of its own: each run asks anew, and counts from 0."""

    def setup(self, trainer, pl_module, stage):
        for term in pl_module.task.generation.reward_terms():
            term.take_counts()
            term._replies = ReplyCache(str(Path(trainer.default_root_dir) / "graded"), "judge")


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def first_rollout(train_on):
    """Indices of its prompts, in order."""
    result = train_on(1, {"any": {"max_steps": 1, "limit_val_batches": 0}})[0]["any"]
    assert len(set(result["prompts"][0])) == 12
    return result["prompts"][0]


@pytest.fixture(scope="module")
def judge():
    """Counts letters, and refuses every completion that ends in a vowel."""
    server = FakeJudge()
    server.grade = lambda text: (400, "no") if text[-1:] in "aeiou" else graded(sum(map(str.isalpha, text)))
    yield JudgeReward("Grade it.", server.url, "j", retries=0, max_failed_share=1.0)
    server.close()


@pytest.fixture(scope="module")
def jobs(first_rollout, folder, judge):
    """Runs in which two ranks, which share the prompts of the first rollout, have different amounts of work."""
    others = tuple(set(range(24)) - set(first_rollout[::2]))
    few = {"max_tokens_per_micro_batch": 24, "prompts_per_rollout": 4}
    uneven = {**few, "sampler": ByPrompt(12, short=others), **ADAM, "loss": GRPOLoss()}
    one_rank = {"reward": Only(first_rollout[:4:2]), "minibatches_per_rollout": 1, "gradient_checkpointing": True}
    left_out = {"kind": Failing, "advantage": BatchStdAdvantage()}
    masks = {"token_mask": TopEntropyMask(0.5), "mask_truncated_completions": True, "loss": DAPOLoss(entropy_coef=0.02)}
    masks |= {"sampler": ByPrompt(20, holes=True)}  # long enough for some to end
    replaced = {"prompts_per_rollout": 8, "dynamic_sampling": DynamicSampling(2), "sampler": ByPrompt(12, holes=True)}
    # Among the first prompts, only the first rank's teach. It has 7 of the 8 groups that are trained on.
    replaced |= {"reward": Only(sorted(set(range(24)) - set(first_rollout[1::2])))}
    episodes = {"environment": Talk(), "reward": None, "credit": "turn", "episodes": EpisodeLimits(max_tokens=60)}
    episodes |= {"sampler": OftenDone(5), "loss": GRPOLoss(kl_coef=0.02), "correction": TokenTruncation()}
    episodes |= {"dynamic_sampling": DynamicSampling(1), "turn_template": "{content}"}
    teacher = ModelTeacher(str(write_model(folder / "teacher", seed=5)))
    compared = {**uneven, "teacher": teacher, "distillation": ReverseKL(), "reward": WeightedSum([DigitShare(), judge])}
    hinted = {**uneven, "teacher": SelfTeacher("{prompt}{answer}#"), "advantage": NoAdvantage()}
    work = {
        "longer completions on one rank": {
            "policy": uneven,
            "adapter": {"rank_pattern": {"attention": 1, "mlp": 3}, "scorer": TailEnergy()},
            "accumulate_grad_batches": 2,
            "callbacks": (Sizes(),),
        },
        "advantages on one rank only": {"policy": {**uneven, **one_rank}, "callbacks": (Streamed(),)},  # then on none
        "masks and an entropy bonus": {"policy": {**few, **masks, **left_out}, "deterministic": True},
        "groups replaced and moved": {"policy": {**replaced, **left_out}},
        "groups of episodes of two rows": {"policy": {**replaced, **left_out, "kind": Rewritten}, "accumulate_grad_batches": 2},
        "a teacher and a judge": {"policy": compared, "accumulate_grad_batches": 2, "callbacks": (Ungraded(),)},
        "the start policy as teacher": {"policy": hinted},
        "episodes of several turns": {"policy": {**episodes, "advantage": BatchStdAdvantage()}},
    }
    return {name: {"max_steps": 2, **job} for name, job in work.items()}


# Features that do not depend on the strategy are tried under one strategy.
UNDER = {
    "ddp": (
        "advantages on one rank only",
        "groups replaced and moved",
        "a teacher and a judge",
        "groups of episodes of two rows",
    ),
    "fsdp2": (
        *("longer completions on one rank", "advantages on one rank only"),
        *("episodes of several turns", "masks and an entropy bonus"),
        *("a teacher and a judge", "the start policy as teacher", "groups of episodes of two rows"),
    ),
}


@pytest.fixture(scope="module")
def single(train_on, jobs):
    return train_on(1, jobs)[0]


@pytest.fixture(scope="module")
def sharded(train_on, jobs):
    """The runs of each rank, which trains under one strategy after the other: (strategy, name) -> result."""
    return train_on(2, {(under, job): {**jobs[job], "strategy": STRATEGIES[under]} for under in UNDER for job in UNDER[under]})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_the_same_run(sharded, single, strategy):
    for name in UNDER[strategy]:
        results, whole = [rank[strategy, name] for rank in sharded], single[name]
        for rank, result in enumerate(results):
            case = f"{name}, rank {rank}"
            assert result["why_slow_decoding"] == "", case  # while sampling weights are whole
            assert result["deterministic"] == (name == "masks and an entropy bonus"), case
            assert result["prompts"][0] == whole["prompts"][0][rank::2], case
            assert len(result["steps"]) == len(whole["steps"]), case
            assert_same_run(result, whole, case)
        if name == "advantages on one rank only":
            # Where none has any advantage a completion of each prompt is measured.
            assert results[0]["rows"][0] > results[1]["rows"][0] == 0 and [result["rows"][1] for result in results] == [2, 2]
            first, second = (result["held"] for result in results)
            assert first["version"] == second["version"]
            torch.testing.assert_close(first["weights"], second["weights"], atol=0, rtol=0)
            torch.testing.assert_close(first["weights"], whole["held"]["weights"], atol=1e-5, rtol=0)
        elif name == "groups replaced and moved":
            assert [result["rows"] for result in results] == [[6] * 2] * 2, "equal work, beside a row of each group left out"
            shares = ("sampling/extra_rollouts", "sampling/kept_groups", "sampling/surplus_groups", "sampling/filled_groups")
            assert [results[0]["steps"][0][name] for name in shares] == [1.0, 8 / 16, 2 / 16, 0.0]
        elif name == "longer completions on one rank":
            parts, held = [result["held"] for result in results], whole["held"]
            assert held["state"] == 2 * held["gradients"] > 0
            assert held == {of: sum(part[of] for part in parts) for of in held}, "each rank keeps its part, and no more"
            assert all(0.4 < part["weights"] / held["weights"] < 0.6 for part in parts)
            assert all(part["gradients"] < held["gradients"] for part in parts)
        elif name == "a teacher and a judge":
            assert results[0]["steps"][0]["judge/calls"] > results[0]["steps"][0]["judge/failed"] > 0, "of both ranks"

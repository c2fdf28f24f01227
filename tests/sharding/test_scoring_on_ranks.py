"""Under FSDP2 all ranks score together: the plan equals one process's up to rounding, and no rank has the whole model."""

import gc
import os

import pytest
from long_cases import long_but
from ranks_of_tests import run
from runs_of_tests import ByPrompt
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaMLP

from hybrid_lightning.adapters import PreconditionedTail, Scorer, SketchedGradients, TailEnergy
from hybrid_lightning.errors import CalibrationError, RewardError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.training import PolicyModule


class Broken(Scorer):
    """Cannot score one of the modules."""

    def score(self, statistics, rank):
        if "layers.1.mlp.up_proj" in statistics.name:
            raise ValueError("no score of it")
        return 0.0


# Adapter, policy, and how far scores may be apart. Ranks add float32 gradients up in another order, which moves entries by a few
# 2^-24 and tails, sums over the smallest directions, by some ten times that. FSDP2 adds gradients of bfloat16 weights up in
# bfloat16, which moves entries by up to 2^-9 each; that is full-rank noise, and a tail has at most about 2^-9 more of it.
JOBS = {
    "default": ({"scorer": PreconditionedTail()}, {"gradient_checkpointing": True}, 1e-5),
    "16 bits": ({"scorer": PreconditionedTail()}, {"dtype": "bfloat16"}, 5e-3),
    "sketches": ({"scorer": TailEnergy(), "gradients": SketchedGradients(size=5), "calibration_prompts": 7}, {}, 1e-5),
    "rewards that tie": ({"scorer": TailEnergy(), "calibration_prompts": 2}, {"reward": Constant()}, 1e-5),
}
SIZES = {"sampler": ByPrompt(12, short=tuple(range(0, 24, 3))), "max_tokens_per_micro_batch": 40, "prompts_per_rollout": 6}


class Watched(PolicyModule):
    """Notes how much of the model this rank has within its passes, as a share."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.seen, logprobs = [], self.task.passes.logprobs

        def look(*_):
            own = [p._local_tensor if isinstance(p, DTensor) else p for p in self.model.parameters()]
            self.seen.append(sum(part.numel() for part in own) / sum(p.numel() for p in self.model.parameters()))

        def watched(sequences):
            handles = [part.register_forward_hook(look) for part in self.model.modules() if isinstance(part, LlamaMLP)]
            result = logprobs(sequences)
            for handle in handles:
                handle.remove()
            return result

        self.task.passes.logprobs = watched


def scored(job, folder, root, strategy="auto", devices=1):
    """A module with a plan."""
    adapter, policy, _ = JOBS[job]
    module = build_policy(folder / "model", kind=Watched, **{**SIZES, **policy})
    chosen = {"strategy": strategy() if callable(strategy) else strategy, "devices": devices, "max_steps": 0}
    if "dtype" in policy:
        chosen["precision"] = "bf16-mixed"
    trainer = build_trainer(root, build_adapter(**adapter), **chosen)
    gc.collect()
    trainer.fit(module, datamodule=build_data(folder / "sums.jsonl"))
    gc.collect()  # as it is done for the memory of an accelerator
    # Nothing holds the copy by which modules were scored.
    split = [type(part) for part in gc.get_objects() if FSDPModule in type(part).__mro__]
    assert len(split) == sum(isinstance(part, FSDPModule) for part in module.modules())
    return module


def score_each(root, jobs=tuple(JOBS), **arguments):
    """Name of a job -> the plan, and the shares of the model."""
    found = {}
    for name in jobs:
        module = scored(name, root=root / name, **arguments)
        found[name] = module.plan, module.seen
        del module
    return found


@pytest.mark.parametrize(("ranks", "jobs"), long_but([(2, ("default",)), (3, ("sketches",)), (2, tuple(JOBS)[1:])], 0, 1))
def test_the_plan_equals_one_process_up_to_rounding(folder, tmp_path, ranks, jobs):
    alone = score_each(tmp_path / "alone", folder=folder, jobs=jobs)
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": FSDP2Strategy, "devices": ranks, "jobs": jobs}
    first, *others = run(ranks, tmp_path / "ranks", score_each, timeout_s=120, **arguments)
    for name, (plan, _) in first.items():
        expected, passes = alone[name]
        scores, known = ({module.name: module.score for module in each.candidates} for each in (plan, expected))
        assert scores == pytest.approx(known, rel=JOBS[name][2]), name
        assert plan.full_modules == expected.full_modules and plan.calibration == expected.calibration, name
        assert max(passes) == 1
        for found in (first, *others):
            assert found[name][0] == plan, name
            shares = found[name][1]
            assert max(shares) < 0.8, (name, shares)
            assert len(shares) <= max(2, 0.75 * len(passes)), name  # which the others make


class NoWay(RewardFunction):
    """Fails on the first rank."""

    def __call__(self, completions, prompts):
        if os.environ["LOCAL_RANK"] == "0":
            raise ValueError("no way")
        return [0.0] * len(completions)


def refused_and_shares(folder, root, devices):
    """The messages about a scorer and a reward, and the share of the model on this rank in each kind of pass."""
    said, flags = [], {"devices": devices, "max_steps": 0}
    for scorer, policy in ((Broken(), {}), (None, {"reward": NoWay()})):
        module = build_policy(folder / "model", **policy)
        with pytest.raises((CalibrationError, RewardError, ValueError)) as raised:
            trainer = build_trainer(root / "refused", build_adapter(scorer=scorer), strategy=FSDP2Strategy(), **flags)
            trainer.fit(module, build_data(folder / "sums.jsonl"))
        said.append(f"{type(raised.value).__name__}: {raised.value}")
    options = {"loss": GRPOLoss(kl_coef=0.1), "epochs_per_rollout": 2, "minibatches_per_rollout": 2}
    module = build_policy(folder / "model", kind=Watched, **{**SIZES, **options})
    trainer = build_trainer(root, build_adapter(), strategy=FSDP2Strategy(), **{**flags, "max_steps": 4})
    trainer.fit(module, datamodule=build_data(folder / "sums.jsonl"))
    return said, module.seen


def test_what_cannot_be_scored_stops_all_ranks_and_none_has_the_whole_model_in_training(folder, tmp_path):
    """A scorer or a reward that fails on one rank."""
    arguments = {"folder": folder, "root": tmp_path / "run", "devices": 2}
    errors, shares = zip(*run(2, tmp_path / "ranks", refused_and_shares, timeout_s=120, **arguments), strict=True)
    (own,) = {rank for rank, (failed, _) in enumerate(errors) if failed == "ValueError: no score of it"}
    assert errors[1 - own][0] == f"CalibrationError: rank {own} could not score the modules: ValueError: no score of it"
    assert errors[0][1].startswith("RewardError: ") and "no way" in errors[0][1]
    assert errors[1][1] == f"CalibrationError: rank 0 could not score the modules: {errors[0][1]}"
    for seen in shares:
        assert len(seen) > 20 and max(seen) < 0.9

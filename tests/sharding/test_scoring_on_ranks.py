"""Under FSDP2 all ranks score together: the plan is that of one process, to the bit, and none has the whole model meanwhile."""

import contextlib
import gc
import os
import signal

import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import ByPrompt
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaMLP

from hybrid_lightning.adapters import PreconditionedTail, Probe, SketchedGradients, SpectrumSNR, TailEnergy, UpdateTail
from hybrid_lightning.errors import CalibrationError, RewardError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.stopping import RunStopped


class Broken(Probe):
    """Cannot score one of the modules once the loss was measured."""

    def score(self, statistics, rank):
        statistics.evaluate_loss()
        if "layers.1.mlp.up_proj" in statistics.name:
            raise ValueError("no score of it")
        return 0.0


JOBS = {
    "default": ({"scorer": PreconditionedTail()}, {"dtype": "bfloat16"}),
    "sketches of halves": ({"scorer": SpectrumSNR(), "gradients": SketchedGradients(size=5), "calibration_prompts": 7}, {}),
    "measured": ({"scorer": Probe()}, {"gradient_checkpointing": True}),
    "updates": ({"scorer": UpdateTail(3, 1)}, {"minibatches_per_rollout": 2, "optimizer": torch.optim.AdamW}),
    "rewards that tie": ({"scorer": TailEnergy(), "calibration_prompts": 2}, {"reward": Constant()}),
}
SIZES = {"sampler": ByPrompt(12, short=tuple(range(0, 24, 3))), "max_tokens_per_micro_batch": 40, "prompts_per_rollout": 6}


class Watched(PolicyModule):
    """Notes how much of the model this rank has within its passes, as a share, and can be stopped in one."""

    seen: list
    stops_at = None  # number of the pass

    def logprobs(self, sequences):
        def look(*_):
            own = [p._local_tensor if isinstance(p, DTensor) else p for p in self.model.parameters()]
            self.seen.append(sum(part.numel() for part in own) / sum(p.numel() for p in self.model.parameters()))
            if len(self.seen) == self.stops_at:
                self.signals.requested = signal.SIGTERM

        handles = [part.register_forward_hook(look) for part in self.model.modules() if isinstance(part, LlamaMLP)]
        result = super().logprobs(sequences)
        for handle in handles:
            handle.remove()
        return result


def scored(job, folder, root, strategy="auto", devices=1, stops_at=None, ckpt_path=None):
    """A module with a plan, and without one if it was stopped."""
    adapter, policy = JOBS[job]
    module = build_policy(folder / "model", kind=Watched, **{**SIZES, **policy})
    module.seen, module.stops_at = [], stops_at
    chosen = {"strategy": strategy() if callable(strategy) else strategy, "devices": devices, "max_steps": 0}
    if "dtype" in policy:
        chosen["precision"] = "bf16-mixed"
    trainer = build_trainer(root, build_adapter(**adapter), **chosen)
    gc.collect()
    with contextlib.suppress(RunStopped):
        trainer.fit(module, datamodule=build_data(folder / "sums.jsonl"), ckpt_path=ckpt_path)
    if distributed.is_initialized():
        distributed.barrier()
    gc.collect()  # as it is done for the memory of an accelerator
    # Nothing holds the copy by which modules were scored.
    split = [type(part) for part in gc.get_objects() if FSDPModule in type(part).__mro__]
    assert module.plan is None or len(split) == sum(isinstance(part, FSDPModule) for part in module.modules())
    return module


def score_each(root, jobs=tuple(JOBS), **arguments):
    """Name of a job -> the plan, and the shares of the model."""
    found = {}
    for name in jobs:
        module = scored(name, root=root / name, **arguments)
        found[name] = module.plan.to_dict(), module.seen
        del module
    return found


STOPPED = "sketches of halves"


def stop_and_go_on(root, folder, stopped_root, devices=1, **arguments):
    """The plan of a run that goes on from the folder of another; without one, none, since it is stopped."""
    kept = next(stopped_root.rglob("gradients.pt"), None)
    if kept is None:
        stops_at = 6 if os.environ.get("LOCAL_RANK", "0") == str(devices - 1) else None  # in the third pass of two blocks
        module = scored(STOPPED, folder, stopped_root, devices=devices, stops_at=stops_at, **arguments)
        assert module.plan is None
        return None, len(module.seen)
    module = scored(STOPPED, folder, root, devices=devices, ckpt_path=kept.parent, **arguments)
    return module.plan.to_dict(), len(module.seen)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    return score_each(root, folder=folder)


ON = {3: ("updates",)}
ON[2] = tuple(job for job in JOBS if job not in ON[3])


@pytest.mark.parametrize(("ranks", "jobs"), ON.items())
def test_the_plan_is_that_of_one_process(folder, tmp_path, alone, ranks, jobs):
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": FSDP2Strategy, "devices": ranks, "jobs": jobs}
    for rank, found in enumerate(run(ranks, tmp_path / "ranks", score_each, timeout_s=120, **arguments)):
        for name, (plan, shares) in found.items():
            expected, passes = alone[name]
            assert plan == expected, (name, rank)
            assert max(passes, default=1) == 1
            assert max(shares, default=0) < 0.8, (name, rank, shares)
            assert len(shares) <= max(2, 0.75 * len(passes)), (name, rank)  # which the others make


class NoWay(RewardFunction):
    """Fails on the first rank."""

    def __call__(self, completions, prompts):
        if os.environ["LOCAL_RANK"] == "0":
            raise ValueError("no way")
        return [0.0] * len(completions)


def refused_and_shares(folder, root, devices):
    """What is said of a scorer and a reward, and how much of the model this rank has in a pass of any kind."""
    said, flags = [], {"devices": devices, "max_steps": 0}
    for scorer, policy in ((Broken(), {}), (None, {"reward": NoWay()})):
        module = build_policy(folder / "model", **policy)
        with pytest.raises((CalibrationError, RewardError, ValueError)) as raised:
            trainer = build_trainer(root / "refused", build_adapter(scorer=scorer), strategy=FSDP2Strategy(), **flags)
            trainer.fit(module, build_data(folder / "sums.jsonl"))
        said.append(f"{type(raised.value).__name__}: {raised.value}")
    options = {"loss": GRPOLoss(kl_coef=0.1), "epochs_per_rollout": 2, "minibatches_per_rollout": 2}
    module = build_policy(folder / "model", kind=Watched, **{**SIZES, **options})
    module.seen = []
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


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_what_ranks_have_stopped_goes_on_on_any_number_of_them(folder, tmp_path, alone, first, second):
    plan, shares = alone[STOPPED]
    arguments = {"folder": folder, "root": tmp_path / "end", "stopped_root": tmp_path / "stopped"}
    for number, ranks in enumerate((first, second)):
        if ranks == 1:
            found = [stop_and_go_on(**arguments)]
        else:
            found = run(ranks, tmp_path / "ranks", stop_and_go_on, **arguments, strategy=FSDP2Strategy, devices=ranks)
        for found_plan, seen in found:
            assert found_plan == (None if number == 0 else plan)
            # Two passes that try the model are among those of a process that samples nothing before.
            assert seen <= len(shares) / ranks - (0 if number == 0 else 4 if ranks == 1 else 2), (number, seen)

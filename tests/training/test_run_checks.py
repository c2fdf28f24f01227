"""`trainer.deterministic=true` works with everything, and a run names at its start what can make two runs differ."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    DigitShare,
    StartsWithDigit,
    Talk,
    build_adapter,
    build_data,
    build_policy,
    build_trainer,
    check,
    fit,
    write_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lightning import losses
from hybrid_lightning.advantages import LeaveOneOutAdvantage, PerRewardAdvantage
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards import CosineLength, FunctionReward, OverlongPenalty, RewardBySet, WeightedSum
from hybrid_lightning.rollout import DynamicSampling, Sampler, sampler
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.runner.cpu import operators as calls
from hybrid_lightning.training import module
from hybrid_lightning.training.run_checks import warn_of_differences


@pytest.fixture(autouse=True)
def flags_as_before(monkeypatch):
    """Lightning sets them for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    torch.use_deterministic_algorithms(False)


class OnGPU(TorchDispatchMode):
    """Refuses what by torch's documentation a GPU refuses under `use_deterministic_algorithms`, as far as we could use it."""

    refused = frozenset({"put", "put_", "histc", "median", "kthvalue", "nll_loss2d", "nll_loss2d_forward", "_ctc_loss"})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        sums = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        weighted = name == "bincount" and (len(args) > 1 and args[1] is not None)
        products = name.startswith("scatter_reduce") and args[4] == "prod"
        assert not (sums or weighted or products or name in self.refused), f"{name} is refused on a GPU"
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:nothing is learned from .* of a rollout's groups")
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # packed, and not packed
def test_nothing_is_computed_that_a_gpu_refuses(family, sums, tmp_path, monkeypatch):
    """With scoring, validation and the export; without kernels, and with the sums that a GPU would take."""
    monkeypatch.setattr(calls, "library", lambda: None)
    monkeypatch.setattr(sampler, "running_sums", sampler.sums_by_doubling)
    policy = {"loss": losses.GSPOLoss(entropy_coef=0.01, kl_coef=0.01), "minibatches_per_rollout": 2, "epochs_per_rollout": 2}
    policy |= {"gradient_checkpointing": True, "dynamic_sampling": DynamicSampling(1), "reward": StartsWithDigit()}
    policy |= {"token_mask": losses.TopEntropyMask(0.5), "correction": losses.TokenTruncation()}
    policy |= {"mask_truncated_completions": True, "sampler": Sampler(16, top_p=0.9, top_k=20)}
    flags = {"deterministic": True, "gradient_clip_val": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    model, data = write_model(tmp_path / "model", family), build_data(sums, validation_fraction=0.2)
    with OnGPU():
        trained = fit(model, None, tmp_path, build_adapter(), policy=policy, data=data, **flags)
        trained.trainer.export(trained, data, folder=str(tmp_path / "exported"))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


# ---- the messages


class Elsewhere(WeightedEngine, Sampler):
    """An engine, as far as it is asked."""

    is_remote = True


class OnDevice(Sampler):
    shares_device = True


@pytest.mark.parametrize(
    ("policy", "flags", "message"),
    [
        ({"samples_per_prompt": 1, "advantage": LeaveOneOutAdvantage()}, {}, "=1: LeaveOneOutAdvantage compares .* to 2 or more"),
        ({"reward": WeightedSum([OverlongPenalty(512, 100)])}, {}, "OverlongPenalty: .*max_new_tokens=6, .* have no effect"),
        ({"sampler": Elsewhere(top_k=3), "correction": losses.TokenTruncation()}, {}, "probabilities over all tokens"),
        ({"rollouts_ahead": -1}, {}, "rollouts_ahead must be at least 0, got -1"),
        ({"rollouts_ahead": 1}, {"overfit_batches": 1}, "restarts each epoch"),
        ({"rollouts_ahead": 1}, {"reload_dataloaders_every_n_epochs": 1}, "would drop the rollouts that were begun"),
        ({"rollouts_ahead": 1, "sampler": Elsewhere(), "dynamic_sampling": DynamicSampling()}, {}, "leave dynamic_sampling out"),
        ({"rollouts_ahead": 1, "sampler": OnDevice()}, {}, "rollouts cannot overlap"),
        ({"rollouts_ahead": 1, "sampler": Elsewhere(), "environment": Talk()}, {}, "model.episodes.workers to 1"),
    ],
)
def test_what_cannot_work_is_refused(model, tmp_path, policy, flags, message):
    """And more, by the command line: `test_cli_errors`."""
    with pytest.raises(ConfigError, match=message):
        check(build_policy(model, **policy), tmp_path, **flags)


def test_what_is_doubtful_where_it_trains_is_warned_of_there(model, tmp_path):
    for policy, message in (
        ({"sampler": Elsewhere()}, r"model\.correction is not set"),
        (
            {"loss": losses.DrGRPOLoss(), "advantage": PerRewardAdvantage()},
            "divides them; give --model.advantage=GroupMeanAdvantage$",
        ),
    ):
        checked = build_policy(model, **policy)
        checked.policy.load()
        check(checked, tmp_path, "validate")  # warnings of ours are errors
        with pytest.warns(UserWarning, match=message):
            check(checked, tmp_path)


def late(completion):
    return 1.0


def late_reward(**arguments):
    return FunctionReward(f"{__file__}:late", **arguments)


def run_on(device, stage="fit", ends_by_clock=False):
    """A run, as far as it is asked."""
    return SimpleNamespace(device=torch.device(device), stage=stage, ends_by_clock=ends_by_clock)


def test_rewards_by_time_and_a_last_moment_are_named_and_nothing_else(monkeypatch):
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)  # a warning of ours is an error
    warn_of_differences(run_on("cpu", "validate", True), "sdpa", [late_reward(timeout_s=9)])
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    timed = late_reward(timeout_s=9, on_timeout=0.0)
    with pytest.warns(UserWarning, match="two runs with the same seed may differ") as said:
        warn_of_differences(run_on("cpu", ends_by_clock=True), "sdpa", [DigitShare(), timed])
    for part in ("OMP_DYNAMIC=true", "unset it", "trainer.max_time", "set only trainer.max_steps", "reward late:"):
        assert part in str(said[0].message)
    assert "earns on_timeout=0 if it takes more than timeout_s=9" in str(said[0].message)
    for outer in (RewardBySet({"a": timed, "b": DigitShare()}), CosineLength(timed, max_tokens=8)):
        assert any("on_timeout=0" in (term.decided_by_time() or "") for term, _ in outer.terms())


def test_on_a_gpu_what_has_no_order_is_named(monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    run = run_on("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.warns(UserWarning, match=r"FLASH_ATTENTION_DETERMINISTIC=1 .*; some GPU operations .*; trainer\.benchmark=true"):
        warn_of_differences(run, "packed_flash_attention_2", [])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with pytest.warns(UserWarning, match=r"set trainer\.deterministic=true$"):
        warn_of_differences(run, "packed_sdpa", [])
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ConfigError, match=r"trainer\.deterministic=true is not possible: .*flash_attention_2.*use sdpa"):
        warn_of_differences(run, "flash_attention_2", [])
    warn_of_differences(run, "sdpa", [])
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    warn_of_differences(run, "flash_attention_2", [])
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="flash_attention_2"):
        warn_of_differences(run, "flash_attention_2", [])


@pytest.mark.parametrize(("kind", "told"), [("cpu", []), ("cuda", [False])])
def test_a_run_on_a_gpu_prepares_the_process_before_anything_is_allocated_and_is_warned(tmp_path, monkeypatch, kind, told):
    policy = build_policy("embedded")
    policy.policy.load()
    policy._trainer = build_trainer(tmp_path, build_adapter(), max_steps=1)
    monkeypatch.setattr(type(policy.trainer.strategy), "root_device", property(lambda _: torch.device(kind)))
    heard = []
    monkeypatch.setattr(module, "prepare_gpu", lambda own_allocator: heard.append(own_allocator))
    with pytest.warns(UserWarning, match="two runs with the same seed may differ") if told else nullcontext():
        policy.check_settings()
    assert heard == told

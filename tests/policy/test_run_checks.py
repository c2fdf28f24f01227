"""`trainer.deterministic=true` works with everything, and what can make two runs differ is said when a run starts."""

import os
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_examples
import tiny_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from tiny_runs import DigitShare, OftenDone, StartsWithDigit, build_adapter, build_data, build_policy, build_trainer, fit
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lightning import losses
from hybrid_lightning.advantages import GroupMeanAdvantage
from hybrid_lightning.engine.cpu import operators as calls
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy import run_checks
from hybrid_lightning.policy.quantization import NF4, Int8
from hybrid_lightning.policy.run_checks import warn_of_differences
from hybrid_lightning.rewards import CosineLength, FunctionReward, RewardBySet, WeightedSum
from hybrid_lightning.rollout import DynamicSampling, Sampler, sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deterministic")
    tiny_runs.write_wide_model(folder / "model")
    tiny_runs.write_wide_model(folder / "gpt2", "gpt2")
    tiny_runs.write_sums(folder / "sums.jsonl", 16)
    tiny_examples.write_rows(folder / "rows.jsonl", 16)
    return folder


@pytest.fixture(autouse=True)
def flags_as_before():
    """Lightning sets them for the whole process."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before[1]
    if before[0] is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


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


class Deterministic(Callback):
    """Sees that the flag holds while there is something to compute."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        self.steps += 1


# Each loss, with bonus and KL term, and one of what else there is.
CASES = {
    losses.GRPOLoss: {},
    losses.GSPOLoss: {"model": "gpt2"},  # which is not packed
    losses.GSPOTokenLoss: {
        "token_mask": losses.TopEntropyMask(0.5),
        "correction": losses.TokenTruncation(),
        "mask_truncated_completions": True,
        "sampler": Sampler(16, top_p=0.9, top_k=20),
    },
    losses.DAPOLoss: {"dynamic_sampling": DynamicSampling(1), "reward": StartsWithDigit(), "sampler": OftenDone(6)},
    losses.DrGRPOLoss: {"gradient_checkpointing": True, "epochs_per_rollout": 2, "advantage": GroupMeanAdvantage()},
    losses.BNPOLoss: {},
    losses.CISPOLoss: {"quantization": NF4},
    losses.SAPOLoss: {"quantization": Int8},
}


def run(folder, root, model="model", **policy):
    policy = {name: value() if isinstance(value, type) else value for name, value in policy.items()}
    seen, data = Deterministic(), build_data(folder / "sums.jsonl", validation_fraction=0.2, test_fraction=0.2)
    flags = {"deterministic": True, "gradient_clip_val": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    module = fit(folder / model, None, root, seen, policy={"minibatches_per_rollout": 2, **policy}, data=data, **flags)
    return module.trainer, module, data, seen.steps


@pytest.fixture
def on_gpu(monkeypatch):
    """No kernels, and the sums that a GPU would take."""
    monkeypatch.setattr(calls, "library", lambda: None)
    monkeypatch.setattr(sampler, "running_sums", sampler.sums_by_doubling)
    return OnGPU()


@pytest.mark.parametrize(("loss", "policy"), CASES.items())
def test_every_kind_of_training(folder, tmp_path, loss, policy, on_gpu):
    if "quantization" in policy:
        pytest.importorskip("bitsandbytes")
    with on_gpu:
        *_, steps = run(folder, tmp_path, loss=loss(entropy_coef=0.01, kl_coef=0.01), **policy)
    assert steps >= 2


@pytest.mark.parametrize("kernels", [True, False])
def test_every_other_command(folder, tmp_path, kernels, request):
    with nullcontext() if kernels else request.getfixturevalue("on_gpu"):
        trainer, module, data, _ = run(folder, tmp_path, loss=losses.GSPOLoss())
        for command in (trainer.validate, trainer.test, trainer.predict):
            assert command(module, datamodule=data, **({} if command == trainer.predict else {"verbose": False}))
        trainer.export(module, data, folder=str(tmp_path / "exported"))
        torch.manual_seed(11)
        again = build_policy(folder / "model")
        build_trainer(tmp_path / "scored", build_adapter(), deterministic=True).score(again, data)
    assert again.plan is not None and (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", tiny_examples.KINDS)
def test_training_on_examples(folder, tmp_path, kind, on_gpu):
    seen = Deterministic()
    with on_gpu:
        tiny_examples.fit(kind, folder / "model", folder / "rows.jsonl", tmp_path, seen, deterministic=True)
    assert seen.steps


def test_a_gpu_would_refuse_cumulative_sums():
    with OnGPU(), pytest.raises(AssertionError, match="cumsum is refused"):
        torch.ones(3).cumsum(0)


# ---- what is said


def late(completion):
    return 1.0


def late_reward(**arguments):
    return FunctionReward(f"{__file__}:late", **arguments)


def said(folder, root, *callbacks, reward, **flags):
    """The warnings of a run of one step and of a validation."""
    data = build_data(folder / "sums.jsonl", validation_fraction=0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit(folder / "model", None, root, *callbacks, policy={"reward": reward}, data=data, max_steps=1, **flags)
        module.trainer.validate(module, datamodule=data, verbose=False)
    return [str(entry.message) for entry in caught if "two runs with one seed may differ" in str(entry.message)]


def test_rewards_by_time_and_a_last_moment_are_named_once_a_run_and_nothing_else(folder, tmp_path, monkeypatch):
    assert said(folder, tmp_path, reward=late_reward(timeout_s=9), benchmark=True) == []
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    reward = WeightedSum([DigitShare(), late_reward(timeout_s=9, on_timeout=0.5)])
    line, of_validation = said(folder, tmp_path, Timer("00:01:00:00"), reward=reward)
    assert "trainer.max_time" not in of_validation and "reward late:" in of_validation, "each run says its own"
    for part in ("OMP_DYNAMIC=true", "unset it", "trainer.max_time", "give trainer.max_steps", "reward late:"):
        assert part in line
    assert "earns on_timeout=0.5 if it takes more than timeout_s=9" in line and "leave out on_timeout" in line
    timed = late_reward(timeout_s=9, on_timeout=0.0)
    for outer in (RewardBySet({"a": timed, "b": DigitShare()}), CosineLength(timed, max_tokens=8)):
        assert any("on_timeout=0" in (term.decided_by_time() or "") for term, _ in outer.terms())


# A Trainer on a GPU, as far as it is asked.
CUDA = SimpleNamespace(root_device=torch.device("cuda"))
OF_GPU = SimpleNamespace(strategy=CUDA, callbacks=(), state=SimpleNamespace(fn="fit"))


def test_on_a_gpu_what_has_no_order_is_named(monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    with pytest.warns(UserWarning, match=r"set trainer\.deterministic=true$"):
        warn_of_differences(OF_GPU, "packed_sdpa", [])
    torch.backends.cudnn.benchmark = True
    with pytest.warns(UserWarning, match=r"FLASH_ATTENTION_DETERMINISTIC=1 .*; some operations .*; trainer\.benchmark=true"):
        warn_of_differences(OF_GPU, "packed_flash_attention_2", [])
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ConfigError, match=r"trainer\.deterministic=true cannot be had: .*flash_attention_2.*take sdpa"):
        warn_of_differences(OF_GPU, "flash_attention_2", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_differences(OF_GPU, "sdpa", [])
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
        warn_of_differences(OF_GPU, "flash_attention_2", [])
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="flash_attention_2"):
        warn_of_differences(OF_GPU, "flash_attention_2", [])


@pytest.mark.filterwarnings("ignore:two runs with one seed may differ")
@pytest.mark.parametrize(("kind", "told"), [("cpu", []), ("cuda", [False])])
def test_a_run_on_a_gpu_prepares_the_process_before_anything_is_allocated(tmp_path, monkeypatch, kind, told):
    policy = build_policy("embedded")
    policy._trainer = build_trainer(tmp_path, build_adapter(), max_steps=1)
    monkeypatch.setattr(type(policy.trainer.strategy), "root_device", property(lambda _: torch.device(kind)))
    heard = []
    monkeypatch.setattr(run_checks, "prepare_gpu", lambda own_allocator: heard.append(own_allocator))
    policy.check_settings()
    assert heard == told

"""The reference of metrics has every name that a run logs, and no other."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import command
from pages import PAGES, ROOT

from hybrid_lightning import losses
from hybrid_lightning.rewards import JudgeReward
from hybrid_lightning.training.engine_generation import EngineGeneration
from hybrid_lightning.training.run import Run
from hybrid_lightning.training.teaching import Teaching
from hybrid_lightning.types import Completion, LossInputs, Prompt, Rollout, Sequences

REFERENCE = PAGES["docs/reference/metrics.md"]
SMALL = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
SMALL += ["--model.eval_samples=4", "--model.sampler.max_new_tokens=8", "--adapter.calibration_prompts=4"]
SMALL += ["--trainer.enable_progress_bar=false", "--data.validation_prompts=4", "--checkpoint.monitor=null"]
EXAMPLES = ["--model.examples_per_step=8", "--data.source.train_size=50"]
ALL = [
    "--model.loss.kl_coef=0.01",
    "--model.loss.off_policy_mask_threshold=0.1",
    "--model.loss.entropy_coef=0.01",
    "--model.token_mask=TopEntropyMask",
]
ALL += ["--model.correction=TokenTruncation", "--model.dynamic_sampling=DynamicSampling", "--config=mixture.yaml"]
ALL += ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4"]
MIXTURE = """
data:
  source:
    class_path: Mixture
    init_args:
      sources:
        one: {class_path: ProductSource, init_args: {low: 10, high: 99, validation_size: 4, test_size: 4}}
        two: {class_path: ProductSource, init_args: {low: 100, high: 299, validation_size: 4, test_size: 4}}
"""
PLACEHOLDERS = {"PART": "exact_match", "SET": "(one|two)", "N": "4", "K": r"\d+"}


def documented():
    """The names of the tables' first columns."""
    columns = re.findall(r"^\| (`.*?) \| ", REFERENCE, re.MULTILINE)
    return [name for column in columns for name in re.findall(r"`([^`]+)`", column)]


def pattern(name):
    return re.compile(re.sub(r"\b(PART|SET|N|K)\b", lambda found: PLACEHOLDERS[found[0]], re.escape(name).replace(r"\-", "-")))


def of_losses():
    """What policy losses log, each on two completions."""
    logprobs, mask = torch.randn(2, 3) - 2, torch.ones(2, 3, dtype=torch.bool)
    names = set()
    for name in losses.__all__:
        kind = getattr(losses, name)
        if isinstance(kind, type) and issubclass(kind, losses.PolicyLoss) and not kind.__abstractmethods__:
            others = {"old_logprobs": logprobs, "entropy": logprobs.exp(), "max_completion_tokens": 3}
            inputs = LossInputs(logprobs.clone(), torch.tensor([1.0, -1.0]), mask, **others)
            ranges = (0.2, 0.2) if kind is losses.TokenClippedLoss else ()  # which has no default
            names |= kind(*ranges)(inputs).metrics.keys()
    return names


def of_engines():
    """Metrics that only an engine with its own weights (vLLM) logs."""
    sampler = SimpleNamespace(is_remote=True, take_idle_seconds=float)
    generation = EngineGeneration(SimpleNamespace(pretrained=None), sampler, None, Run())
    mismatch = {"sampling/mismatch/mean", "sampling/mismatch/max"}  # after the first comparison
    return generation.metrics().keys() | mismatch | {"sampling/weights_versions"}


def of_judges():
    """What a judge counts, whom no server answers here."""
    return JudgeReward("Grade it.", "http://localhost/v1", "judge", prices=(1.0, 2.0)).take_counts().keys()


def of_teachers():
    """Metrics of a teacher, when a rollout is made and in an update."""
    logprobs = torch.zeros(2, 3)
    trained = SimpleNamespace(sampled_mask=torch.ones(2, 3, dtype=torch.bool))
    kinds = {
        "listen": None,
        "needs_start_policy": False,
        "is_remote": False,
        "held_bytes": lambda *_: 0,
        "check_prompts": lambda *_: None,
    }
    teacher = SimpleNamespace(show=lambda *_: trained, logprobs=lambda *_: logprobs, predict=lambda *_: None, **kinds)
    parts = (
        SimpleNamespace(compared=lambda *_: [logprobs] * 4),
        SimpleNamespace(run=Run(), encode=None, check_lengths=None),
        teacher,
    )
    ids = torch.ones(2, 3, dtype=torch.long)
    sequences, texts = Sequences(ids, ids > 0, ids, ids > 0), (Completion("", 3, True),) * 2
    rollout = Rollout((Prompt(text="?"),), texts, sequences, logprobs, advantages=torch.zeros(1, 2))
    chunk = SimpleNamespace(seen_by_teacher=None, sequences=None)
    measured = Teaching(*parts, losses.ReverseKL()).predict(chunk)[-1]
    return Teaching(*parts, losses.SampledReverseKL()).teach(rollout, trained)[0].metrics.keys() | measured.keys()


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names in `metrics.csv` of a run by RL with every option on, one of a mixture, SFT and DPO."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "mixture.yaml").write_text(MIXTURE)
    names = of_losses() | of_engines() | of_judges() | of_teachers()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config, options in (("gspo", ALL), ("sft", EXAMPLES), ("dpo", EXAMPLES)):
            logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.name={config}"]
            command(["fit", f"--config={ROOT / 'configs' / config}.yaml", *logger, *SMALL, *options], patch)
            (path,) = Path("runs", config).glob("*/metrics.csv")
            with path.open() as lines:
                names |= set(next(csv.reader(lines)))
    return names - {"step"}


def test_every_metric_is_documented_and_every_documented_one_is_logged(logged):
    known = {name: pattern(name) for name in documented()}
    for name in sorted(logged):
        of_all_sets = re.sub(r"^val/(one|two)/", "val/", re.sub(r"/ci_(low|high)$", "", name))
        assert any(one.fullmatch(of_all_sets) for one in known.values()), f"{name} is not in docs/reference/metrics.md"
    gone = [name for name, one in known.items() if not any(map(one.fullmatch, logged))]
    assert not gone, f"docs/reference/metrics.md has what is not logged: {gone}"

"""The reference of metrics has every name that a run logs, and no other."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import command
from pages import PAGES, ROOT
from test_readme import SMALL

from hybrid_lightning import losses
from hybrid_lightning.policy.generation import Generation
from hybrid_lightning.types import LossInputs

REFERENCE = PAGES["docs/reference/metrics.md"]
VALIDATION = [
    "--trainer.limit_val_batches=1",
    "--data.validation_prompts=4",
    "--trainer.val_check_interval=2",
    "--trainer.max_steps=2",
    "--model.eval_samples=4",
]
ALL = [
    "--model.loss.kl_coef=0.01",
    "--model.loss.entropy_coef=0.01",
    "--model.token_mask=TopEntropyMask",
    "--model.correction=TokenTruncation",
    "--model.dynamic_sampling=DynamicSampling",
    "--model.minibatches_per_rollout=2",
]
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
            inputs = LossInputs(
                logprobs.clone(),
                torch.tensor([1.0, -1.0]),
                mask,
                old_logprobs=logprobs,
                entropy=logprobs.exp(),
                max_completion_tokens=3,
            )
            ranges = (0.2, 0.2) if kind is losses.TokenClippedLoss else ()  # which has no default
            names |= kind(*ranges)(inputs).metrics.keys()
    return names


def of_engines():
    """What is logged beside the rest where an engine has weights of its own, as vLLM has."""
    sampler = SimpleNamespace(has_own_weights=True, completes_elsewhere=True, idle_seconds=0.0)
    return Generation(SimpleNamespace(sampler=sampler)).metrics().keys() | {"sampling/weights_versions"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names in `metrics.csv` of a run by RL with all that can be switched on, one of a mixture, SFT and DPO."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "mixture.yaml").write_text(MIXTURE)
    steps = ("--trainer.max_steps", "--trainer.limit_val", "--trainer.num_sanity")
    small = [option for option in SMALL if not option.startswith(steps)]
    examples = [*(option for option in small if "_per_" not in option), "--model.examples_per_step=8"]
    names = of_losses() | of_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config, options in (("gspo", [*small, *ALL, "--config=mixture.yaml"]), ("sft", examples), ("dpo", examples)):
            logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.name={config}"]
            command(["fit", f"--config={ROOT / 'configs' / config}.yaml", *logger, *options, *VALIDATION], patch)
            (path,) = Path("runs", config).glob("*/metrics.csv")
            with path.open() as lines:
                names |= set(next(csv.reader(lines)))
    return names - {"step"}


def test_every_metric_is_documented(logged):
    known = [pattern(name) for name in documented()]
    intervals = re.compile(r"/ci_(low|high)$")
    for name in sorted(logged):
        of_all_sets = re.sub(r"^val/(one|two)/", "val/", intervals.sub("", name))
        assert any(one.fullmatch(of_all_sets) for one in known), f"{name} is logged and not in docs/reference/metrics.md"


def test_every_documented_metric_is_logged(logged):
    gone = [name for name in documented() if not any(pattern(name).fullmatch(other) for other in logged)]
    assert not gone, f"docs/reference/metrics.md has what is not logged: {gone}"

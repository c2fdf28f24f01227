"""The command line in this process: a folder with config, model, data and parts of a user's own, and commands run in it."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tiny_runs import write_model, write_sums

from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.callbacks import hybrid_adapter_setup
from hybrid_lightning.cli import main as cli

CONFIG = """
model:
  model: {folder}/model
  loss: {{class_path: GRPOLoss, init_args: {{clip_low: 0.2, clip_high: 0.25}}}}
  reward: {{class_path: my_parts.StartsWithDigit}}
  sampler: {{class_path: Sampler, init_args: {{max_new_tokens: 6}}}}
  prompts_per_rollout: 4
  samples_per_prompt: 4
  minibatches_per_rollout: 2
  eval_samples: 2
  lr_full: 0.001
  lr_lora: 0.01
data:
  source:
    class_path: FileSource
    init_args: {{train: {folder}/sums.jsonl, validation_fraction: 0.2, test_fraction: 0.2}}
  format: PlainFormat
adapter:
  rank: 2
  calibration_prompts: 12
trainer:
  accelerator: cpu
  max_steps: 4
  check_val_every_n_epoch: null
  val_check_interval: 2
  enable_progress_bar: false
"""
# For given completions, without a reward.
DEMONSTRATIONS = """
model:
  class_path: SupervisedModule
  init_args: {{model: {folder}/model, examples_per_step: 8, lr_full: 0.001, lr_lora: 0.01}}
data:
  source:
    class_path: FileSource
    init_args: {{train: {folder}/sums.jsonl, validation_fraction: 0.2, test_fraction: 0.2}}
  format: {{class_path: DemonstrationFormat, init_args: {{completion: "{{answer}}"}}}}
adapter: {{rank: 2, calibration_prompts: 12}}
trainer: {{accelerator: cpu, max_steps: 2, check_val_every_n_epoch: null, val_check_interval: 2, enable_progress_bar: false}}
"""
PARTS = '''
"""Parts of a user."""
from hybrid_lightning.environments import Environment
from hybrid_lightning.rewards import RewardFunction


class StartsWithDigit(RewardFunction):
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def __call__(self, completions, prompts):
        return [float(text[:1].isdigit()) * (1 + self.bonus) for text in completions]


class Unready(RewardFunction):
    def __call__(self, completions, prompts):
        return [0.0 for _ in completions]

    def check_prompt(self, prompt):
        raise SystemExit("not now")


class Odd(Environment):
    def __init__(self, number: int):
        self.number = 1 / number

    def tools(self):
        return "nothing"

    def step(self, message):
        pass


class Raising(RewardFunction):
    def __call__(self, completions, prompts):
        return [1 / 0 for _ in completions]
'''


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of the error output."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def assert_refused(result: Result, message: str) -> None:
    """A command has failed, and its last line has the reason."""
    assert result.code != 0 and result.last.startswith("error: ") and "Traceback" not in result.err, result.err
    assert re.search(message, result.last), result.last


def empty_picture(plan: AdapterPlan) -> Figure:
    """In the place of a heat map."""
    return Figure(figsize=(0.1, 0.1))


def run(folder, *arguments) -> Result:
    """One command in a folder, from which Python imports as it does for `python -m`; the picture of its plan is empty."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(hybrid_adapter_setup, "draw_heatmap", empty_picture)
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")  # set by the command, and gone afterwards
        patch.setattr(sys, "argv", ["hybrid_lightning", *map(str, arguments)])
        torch.set_num_threads(1)
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def done(folder, *arguments) -> Result:
    """One command, which has to end well."""
    result = run(folder, *arguments)
    assert result.code == 0, result.err[-3000:]
    return result


def command(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command in the working directory, which prints and raises as it does."""
    monkeypatch.setattr(sys, "argv", ["hybrid_lightning", *arguments])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the command, and gone afterwards
    cli.main()


def parse(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config as the command line reads it; nothing is built."""
    parsed = []

    def stop(self):
        parsed.append(self.config[self.subcommand])
        raise StopIteration

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(cli.HybridLightningCLI, "before_instantiate_classes", stop)
        command(arguments, patch)
    return parsed[0]


def write_folder(folder: Path) -> Iterator[Path]:
    """Body of a fixture: the folder filled, and first on Python's path."""
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl", 40)
    (folder / "t.yaml").write_text(CONFIG.format(folder=folder))
    (folder / "sft.yaml").write_text(DEMONSTRATIONS.format(folder=folder))
    (folder / "my_parts.py").write_text(PARTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("my_parts", None)

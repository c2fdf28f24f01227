"""A user's mistake: the last line explains it, the exit code is not 0, and nothing is left.

Data, reward, monitors and settings are checked before a model is loaded: where its weights cannot be, they say so if asked.
"""

import errno
import os
import shutil
from unittest.mock import Mock

import pytest
from cli_runs import assert_refused, done, run, write_folder

from hybrid_lightning.callbacks import RunSummary

PARTS = """
from pathlib import Path

from lightning.pytorch import Callback
from hybrid_lightning.data import PromptDataModule
from tiny_runs import Talk


class Logs(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/own", 1.0)


class Prepared(PromptDataModule):
    def prepare_data(self):
        Path("prepared.jsonl").write_text(Path("sums.jsonl").read_text())
"""
JUDGE = "model:\n  reward:\n    class_path: JudgeReward\n    init_args:\n"
FILES = {
    "foreign.ckpt": "hello",
    "broken.yaml": "model:\n  loss: {class_path: GSPOLoss\n  a: b",
    "bell.yaml": "model: \a",
    "colon.yaml": f"{JUDGE}      rubric: Grade the answer: 10 if it is right\n",
    "flow.yaml": "model: {reward: {class_path: JudgeReward, rubric: Grade the answer: 10 if it is right}}\n",
    "map.yaml": f"{JUDGE}      rubric:\n        Grade the answer: 10 if it is right\n",
    "file": "",
    "long.jsonl": "\n".join(f'{{"question": "{"1" * (125 if n == 5 else 4)}{n}", "answer": "1"}}' for n in range(40)),
    "words.jsonl": "\n".join(f'{{"question": "{n}", "answer": "an answer"}}' for n in range(40)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("errors")):
        shutil.copytree(folder / "model", folder / "unreadable")
        (folder / "unreadable" / "model.safetensors").write_bytes(b"no weights")
        with (folder / "my_parts.py").open("a") as file:
            file.write(PARTS)
        for name, text in FILES.items():
            (folder / name).write_text(text)
        yield folder


# A command, and its last line.
COMMANDS = [
    ("", r"no command was given; give one, such as .* fit --config gspo \(--help lists all\)"),
    ("fit", r"model\.loss is missing; give a config, such as --config gspo"),
    ("--config t.yaml fit", r"--config comes after the command; give python -m hybrid_lightning fit --config FILE"),
    ("fit --config nowhere.yaml", r"--config \S*nowhere\.yaml: there is no such file; .* that the command 'configs' lists$"),
    ("fit --config broken.yaml", r"--config broken\.yaml is not valid YAML: .* in line 3; correct it$"),
    ("fit --config bell.yaml", r"--config bell\.yaml is not valid YAML: unacceptable character #x0007: .*; correct it$"),
    (
        "fit --config colon.yaml",
        r"not valid YAML: mapping values are not .* in line 5; put a text that contains ': ' in quotes, or",
    ),
    (
        "fit --config flow.yaml",
        r"not valid YAML: .*got ':' in line 1; put a text that contains ': ' in quotes, or correct the line$",
    ),
    (
        "fit --config t.yaml --config map.yaml",
        r"map\.yaml: model\.reward\S*\.rubric: .* does not fit; give text; put text that .* in quotes ",
    ),
    ("predict --config t.yaml --predictions.path=file/p.jsonl", r"file/p\.jsonl: .*/file is not a writable folder; give another"),
    ("export --config t.yaml --folder=new --ckpt_path=best.ckpt", r"there is no checkpoint best\.ckpt .*such as foreign\.ckpt"),
]
# What is added to `fit` by a config that works.
OPTIONS = [
    ("model.reward=json.dumps", r"json\.dumps is not a class derived .* FunctionReward with function: json\.dumps$"),
    # what a user's own classes do
    ("model.environment=my_parts.Odd model.environment.number=0", r"Odd\.__init__ raised ZeroDivisionError: .*my_parts\.py line"),
    ("model.environment=my_parts.Odd model.environment.number=1", r"Odd\.tools returned 'nothing'; it must return a list of"),
    ("model.reward=my_parts.Unready", r"Unready\.check_prompt raised SystemExit: not now \(my_parts\.py line \d+\); correct it"),
    ("trainer.max_steps=-5", r"trainer: `max_steps` must be a non-negative integer or -1"),
    ("trainer.devices=[0,1]", r"trainer: `devices` selected with .* give --trainer\.devices=1, or auto"),
    (
        "trainer.strategy.class_path=lightning.pytorch.strategies.FSDPStrategy",
        r"FSDPStrategy is FSDP1, which is not supported; give fsdp",
    ),
    ("model.dtype=bfloat16 trainer.precision=bf16-true", r"precision=bf16-true is not supported: .*; use bf16-mixed"),
    ("model.quantization=Int8", r"quantization: unknown class Int8; give one of NF4"),
    # types
    ("model.samples_per_prompt=eight", r"--model\.samples_per_prompt: 'eight' does not fit; give a whole number$"),
    ("model.sampler.temperature=warm", r"--model\.sampler\.temperature: 'warm' does not fit; give a number$"),
    ("data.validation_prompts=all", r"--data\.validation_prompts: 'all' does not fit; give a whole number or null$"),
    ("trainer.precision=fp16", r"--trainer\.precision: 'fp16' does not fit; give 32-true, bf16-mixed or 16-mixed$"),
    ("model.credit=step", r"--model\.credit: 'step' does not fit; give episode or turn$"),
    # places
    ("trainer.logger.save_dir=file", r"run folder cannot .*'file/default'; give .* by --trainer\.logger\.save_dir=FOLDER"),
    ("trainer.logger=MLFlowLogger trainer.logger.save_dir=file", "MLflow's store .*'file'; give another place by --trainer"),
    ("trainer.enable_checkpointing=false", r"for no checkpoints give --checkpoint\.save_last=false --checkpoint\.save_top_k=0"),
    ("ckpt_path=last", "ckpt_path=last means a checkpoint of this run, .* such as runs/NAME/version_0/checkpoints/"),
]
LONG_EPISODES = "model.environment=my_parts.Talk model.turn_template={content} model.episodes.max_tokens=1000"
# Command, config and options where the model's weights cannot be loaded.
UNLOADED = [
    ("test t", "cannot load the model"),
    # data
    ("validate t data.source.init_args.validation_fraction=0", "no validation rows, but validate needs some"),
    ("fit t model.sampler.max_new_tokens=200", r"model\.sampler\.max_new_tokens=200 leaves 0 .* lower .* to 124 or less$"),
    (
        "doctor t data.source.init_args.train=long.jsonl",
        r"1 of \d+ prompts .* first .*long\.jsonl row 5 with 126 tokens: .* leaves 122 of .* 128 .*_tokens=122 to drop them, or",
    ),
    (
        f"doctor t {LONG_EPISODES}",
        r"episodes\.max_tokens=1000 leaves 0 of the model's 128 positions; lower model\.episodes\.max_tokens to 12\d or less$",
    ),
    (f"plan t {LONG_EPISODES}", r"a completion of 1000 exceed .* for episodes, model\.episodes\.max_tokens$"),
    ("fit t model.prompts_per_rollout=1000", "prompts_per_rollout=1000 is more than the 24 training prompts"),
    ("fit sft data.format=PlainFormat", "has 0 completions, but SupervisedLoss needs one"),
    # reward
    ("fit t data.source.init_args.train=words.jsonl model.reward=MathMatch", "reference answer 'an answer' .* neither a number"),
    ("predict sft", r"predict scores completions; give model\.reward"),
    # monitors
    ("fit t checkpoint.monitor=val/avg@8", "ModelCheckpoint has monitor=val/avg@8, .* one of val/greedy_accuracy, .*val/avg@2"),
    ("fit sft checkpoint.monitor=val/avg@8", "monitor=val/avg@8, .* one of val/loss, val/entropy"),
    # settings
    ("fit t model.loss.kl_coef=0.1 adapter.keep_start_weights=false", r"set adapter\.keep_start_weights=true"),
]


def written(command, config, *options):
    return " ".join([command, "--config", f"{config}.yaml", *(f"--{option}" for option in options)])


MISTAKES = [
    *COMMANDS,
    *((written("fit", "t", *options.split()), message) for options, message in OPTIONS),
    *((f"{written(*words.split())} --model.model=unreadable", message) for words, message in UNLOADED),
]


def content(folder):
    """All files of a folder, except Python's compiled modules."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_said_in_the_last_line_and_leaves_nothing(folder, command, message):
    before = content(folder)
    assert_refused(run(folder, *command.split()), message)
    assert content(folder) == before


def test_a_text_with_a_colon_is_put_in_quotes_within_those_of_the_shell(folder):
    given = ["fit", "--config", "t.yaml", "--model.reward=JudgeReward", "--model.reward.rubric=Grade it: 10 if it is right"]
    remedy = "put text that contains ': ' in quotes (in a shell '\"text\"')"
    assert run(folder, *given).last.endswith(f" does not fit; give text; {remedy}")
    given[-1] = given[-1].replace("=", '="') + '"'
    assert "rubric" not in run(folder, *given).last, "only what else is missing"


def test_what_a_callback_of_ones_own_logs_may_be_monitored(folder):
    options = ["--trainer.callbacks+=my_parts.Logs", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    options += ["--trainer.default_root_dir=own", "--trainer.logger=false", "--adapter.scorer=Random"]
    done(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/own")
    result = run(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/other")
    assert_refused(result, "monitor=val/other, which validation does not measure")


def test_a_data_module_of_ones_own_may_prepare_its_files(folder):
    given = ["--data=my_parts.Prepared", "--data.source.init_args.train=prepared.jsonl", "--data.format=PlainFormat"]
    options = ["--trainer.logger=false", "--trainer.default_root_dir=once", "--adapter.scorer=Random"]
    done(folder, "score", "--config", "t.yaml", *options, *given)
    assert (folder / "prepared.jsonl").is_file() and list((folder / "once").rglob("plan.json"))


def test_a_reward_that_fails_while_modules_are_scored_leaves_nothing(folder):
    before = content(folder)
    result = run(folder, "fit", "--config", "t.yaml", "--model.reward=my_parts.Raising")
    assert_refused(result, r"reward Raising .* raised ZeroDivisionError: .*sums\.jsonl row \d+ with completion '")
    assert content(folder) == before


def test_a_full_disk_is_one_line(folder, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/default/version_0/summary.json")
    monkeypatch.setattr(RunSummary, "_summary", Mock(side_effect=full))
    options = ["--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--adapter.scorer=Random"]
    result = run(folder, "fit", "--config", "t.yaml", *options, "--trainer.logger.init_args.name=full")
    assert_refused(result, r"No space left on device: '.*summary\.json'; make room, or give another place by --trainer\.logger")


def test_a_mistake_of_ours_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("hybrid_lightning.cli.main.check_run_folder", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        run(folder, "fit", "--config", "t.yaml")

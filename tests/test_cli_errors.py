"""What a user gets wrong is said in the last line, and the exit code is not 0.

What is found before a model is loaded is in `test_checked_before_loading.py`.
"""

import errno
import os
import re
import shutil
from unittest.mock import Mock

import pytest
from cli_runs import assert_refused, run, write_folder

from hybrid_lightning.callbacks import HybridAdapterSetup, RunSummary
from hybrid_lightning.cli import HybridLightningCLI


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("errors")):
        write_bad_files(folder)
        yield folder


def write_bad_files(folder):
    for name, text in {"list.yaml": "- a\n- b\n", "other.json": '{"a": 1}', "foreign.ckpt": "hello", "file": ""}.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xff\xfe", "answer": "2"}\n')
    shutil.copytree(folder / "model", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


COMMANDS = [
    ("", r"no command is given; there are fit, validate, test, predict, .*, doctor and compare, as in .* --config FILE"),
    ("fit", r"model\.loss must be given, nearly always by a config: --config FILE"),
    ("fit --config nope.yaml", r"File does not exist: .*nope\.yaml"),
    ("fit --config list.yaml", r"a config must be a mapping such as .* but is: - a - b"),
    ("score --config t.yaml --ckpt_path=foreign.ckpt", r"score goes on from the folder scoring of a run that was stopped"),
    ("export --config t.yaml --folder=x --form.dtype=float32", "which ExportForm, one of AdapterFolder, LoraFolder, MergedModel"),
    ("predict --config t.yaml --predictions.path=file/p.jsonl", r"file/p\.jsonl: .*/file is no folder .* another"),
    ("--config t.yaml fit", r"a config stands behind the command.*: python -m hybrid_lightning fit --config FILE"),
    ("validate --config t.yaml --trainer.logger.save_dir=file", r"the run folder cannot .* --trainer\.logger\.save_dir=FOLDER"),
    ("export --config t.yaml", r"\bfolder\b"),
    ("export --config t.yaml --folder=model", r"folder='model' is there and not empty; give a new folder"),
    ("export --config t.yaml --folder=new --ckpt_path=best.ckpt", r"there is no checkpoint best\.ckpt .*such as foreign\.ckpt"),
    ("export --config t.yaml --folder=new", r"cannot export: .* nothing was trained; give ckpt_path, or fit first"),
]


# What is added to a config that works, and what the last line has to say.
OPTIONS = [
    # names and types
    ("model.reward=json.dumps", r"json\.dumps is no class derived .* FunctionReward with function: json\.dumps$"),
    ("model.lr_full=abc", r'"lr_full": Expected a .*float.* value: abc'),
    # classes
    ("model.loss=my_parts.NotALoss", r"my_parts\.NotALoss does not correspond to a subclass of PolicyLoss"),
    # values
    ("model.schedule=CosineSchedule trainer.max_steps=-1 trainer.max_epochs=-1", r"CosineSchedule needs the run's length"),
    # classes of the user's
    *[
        (
            f"model.environment=my_parts.Odd model.environment.place={place}",
            rf"Odd\.{place} raised ZeroDivisionError: division by zero \(my_parts\.py line \d+\); correct it",
        )
        for place in ("__init__", "prepare", "tools")
    ],
    ("model.environment=my_parts.Odd model.environment.place=-", r"Odd\.tools returned 'nothing'; it must return a list of JSON"),
    ("model.reward=my_parts.Unready", r"Unready\.check_prompt raised SystemExit: not now \(my_parts\.py line \d+\); correct it"),
    # models, plans and checkpoints
    ("model.model=/nowhere", r"model '/nowhere' does not exist"),
    ("model.model=cut", r"cannot load the model 'cut'"),
    ("adapter.plan=other.json", r"other\.json lacks the field"),
    ("ckpt_path=nope.ckpt", r"there is no checkpoint nope\.ckpt \(looked for .*\); give one .* such as foreign\.ckpt"),
    # data
    ("data.source.init_args.train=latin.jsonl", r"train='latin\.jsonl' cannot be read: .*utf-8"),
    # numbers
    ("trainer.max_steps=-5", r"trainer: `max_steps` must be a non-negative integer or -1"),
    # devices
    ("trainer.accelerator=tpu", r"(torch_xla.*not met|can not run on your system).*; .*give --trainer\.accelerator=cpu"),
    ("trainer.devices=[0,1]", r"trainer: `devices` selected with .* give --trainer\.devices=1, or auto"),
    ("trainer.strategy=fsdp", r"strategy `fsdp` requires a GPU .*; give --trainer\.accelerator=gpu on a machine that has one"),
    # places
    ("trainer.logger.save_dir=file", r"run folder cannot .*'file/default'; give .* by --trainer\.logger\.save_dir=FOLDER"),
    ("trainer.logger=MLFlowLogger trainer.logger.save_dir=file", "MLflow's store .*'file'; give another place by --trainer"),
    ("trainer.enable_checkpointing=false", r"for no checkpoints give --checkpoint\.save_last=false --checkpoint\.save_top_k=0"),
    (
        "ckpt_path=last",
        "ckpt_path=last means a checkpoint of this run, .* give its path, such as runs/NAME/version_0/checkpoints/",
    ),
    # what other loggers begin is no run
    ("trainer.logger=false data.source.init_args.train=/nope.jsonl", r"train='/nope\.jsonl' does not exist"),
]


MISTAKES = [*COMMANDS, *((f"fit --config t.yaml --{options.replace(' ', ' --')}", message) for options, message in OPTIONS)]


def content(folder):
    """All that is in a folder, but for what Python makes of modules."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_said_in_the_last_line_and_leaves_nothing(folder, command, message):
    before = content(folder)
    assert_refused(run(folder, *command.split()), message)
    left = content(folder) - before
    assert not left or any(path.name == "scores.json" for path in left), "a command that has done nothing leaves nothing"


def test_what_has_been_scored_stays(folder):
    """A reward that fails can be mended, and the run go on from the completions that there are."""
    name = "--trainer.logger.init_args.name=kept"
    result = run(folder, "fit", "--config", "t.yaml", "--model.reward=my_parts.Raising", name)
    assert_refused(result, r"reward Raising .* raised ZeroDivisionError: .*sums\.jsonl row \d+ with completion '")
    root = folder / "runs" / "kept" / "version_0"
    assert list((root / "scoring").glob("completions-*.pt")) and "my_parts.Raising" in (root / "config.yaml").read_text()
    assert not (root / "plan.json").exists() and not (root / "checkpoints").exists()


def test_the_commands_that_are_named_are_all(folder):
    named = re.search(r"there are (.*), as in", run(folder).last)[1]
    assert set(re.split(r", | and ", named)) == {*HybridLightningCLI.subcommands(), "compare"}


def test_a_run_that_is_interrupted_before_it_has_done_anything_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(HybridAdapterSetup, "setup", Mock(side_effect=KeyboardInterrupt))
    before = content(folder)
    assert run(folder, "fit", "--config", "t.yaml", "--trainer.logger.init_args.name=interrupted").code != 0
    assert content(folder) == before


def test_a_full_disk_is_one_line(folder, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/default/version_0/summary.json")
    monkeypatch.setattr(RunSummary, "_summary", Mock(side_effect=full))
    result = run(folder, "fit", "--config", "t.yaml", "--trainer.max_steps=1", "--trainer.logger.init_args.name=full")
    assert_refused(result, r"No space left on device: '.*summary\.json'; make room, or give another place by --trainer\.logger")


def test_a_mistake_of_ours_keeps_its_traceback(folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("hybrid_lightning.trainer.Trainer.fit", fail)
    with pytest.raises(KeyError, match="a bug"):
        run(folder, "fit", "--config", "t.yaml")

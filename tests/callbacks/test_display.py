"""Every printed command runs as it is and is in `summary.json`; where none would run, none is printed."""

import json
import re
import shlex
import shutil
import signal
import sys

import pytest
from cli_runs import done, run, write_folder
from stopped_runs import MOMENTS, Sent
from tiny_runs import build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.callbacks.display import command_line

OWN = ("fit", "--config", "t.yaml", "--trainer.max_steps=2", "--adapter.scorer=Random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # A name that a shell would take apart.
    root = tmp_path_factory.mktemp("it's a run")
    yield from write_folder(root)


def commands(result):
    """Arguments of all commands of ours on a screen."""
    return [shlex.split(line) for line in re.findall(r"python\S* -m hybrid_lightning (.+)", result.out)]


def summary_of(result, folder):
    root = folder / re.search(r"^Run folder: (.+)$", result.out, re.MULTILINE)[1]
    return json.loads((root / "summary.json").read_text())


def next_command(folder, command, *options):
    """Arguments of the next command that a run names, once that command has run."""
    result = done(folder, *OWN, *options)
    assert summary_of(result, folder)["next_command"] == re.search(r"^Next: +(.+)$", result.out, re.MULTILINE)[1]
    assert (folder / re.search(r"^Plan.* written to (.+)$", result.out, re.MULTILINE)[1]).is_file()
    ((named, *arguments),) = commands(result)
    typed = run(folder, named, *arguments)
    assert named == command and typed.code == 0, typed.err[-2000:]
    return arguments


def test_the_next_command_runs_wherever_the_run_lies(folder):
    place = ("--trainer.logger.save_dir=here and there", '--trainer.logger.name=a [red] "b"')
    _, config, _, checkpoint = next_command(folder, "test", "--checkpoint.dirpath=my checkpoints", *place)
    longer = done(folder, "fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_steps=4")
    ((_, _, own, _, last),) = commands(longer)
    assert (folder / own).is_file() and (folder / last).is_file() and own != config, "a resumed run prints its own"


def test_without_a_logger_and_a_test_prompt_that_is_short_enough_it_is_validate(folder):
    (folder / "long.jsonl").write_text('{"question": "1+1+1+1+1+1+1=", "answer": "7"}\n')
    long = ("--data.source.test_fraction=0", "--data.source.test=long.jsonl", "--data.max_prompt_tokens=8")
    next_command(folder, "validate", *long, "--trainer.logger=false")


def test_where_nothing_can_be_measured_there_is_the_checkpoint_alone_or_nothing(folder):
    nothing = (*OWN, "--trainer.max_steps=1", "--data.source.test_fraction=0", "--data.source.validation_fraction=0")
    result = run(folder, *nothing)
    summary = summary_of(result, folder)
    assert result.code == 0 and commands(result) == [] and summary["next_command"] == ""
    assert f"Checkpoint: {summary['checkpoint']}\n" in result.out and (folder / summary["checkpoint"]).is_file()
    result = done(folder, *nothing, "--checkpoint.save_last=false", "--checkpoint.save_top_k=0")
    assert commands(result) == [] and "Checkpoint:" not in result.out


def test_from_python_a_stopped_run_prints_the_argument_that_resumes_it(folder, tmp_path, capsys, monkeypatch):
    data = build_data(folder / "sums.jsonl")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        Sent(patch, MOMENTS["the second rollout"], signal.SIGTERM)
        build_trainer(tmp_path, GracefulStop(), build_adapter()).fit(build_policy(folder / "model"), datamodule=data)
    given = re.search(r"Trainer\.fit\(\.\.\., (ckpt_path='.+')\)", capsys.readouterr().out)[1]
    again = build_trainer(tmp_path, GracefulStop(), build_adapter())
    known = {"trainer": again, "policy": build_policy(folder / "model"), "data": data}
    exec(f"trainer.fit(policy, datamodule=data, {given})", known)
    assert again.global_step == 2


def test_the_command_names_an_environment_that_is_not_activated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"base_prefix": "/usr", "prefix": tmp_path / ".venv", "executable": tmp_path / ".venv/bin/python"}.items():
        monkeypatch.setattr(f"sys.{name}", str(value))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert command_line("fit", "a b") == "python -m hybrid_lightning fit 'a b'"
    monkeypatch.delenv("VIRTUAL_ENV")
    assert command_line("fit").startswith(".venv/bin/python -m ")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "hybrid-lightning")])
    assert command_line("fit") == ".venv/bin/hybrid-lightning fit"
    monkeypatch.setattr(shutil, "which", lambda name: sys.argv[0])
    assert command_line("fit", "a b") == "hybrid-lightning fit 'a b'"

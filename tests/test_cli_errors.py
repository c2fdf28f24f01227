"""What a user gets wrong is said in the last line, the exit code is not 0, and nothing is left.

Data, reward, monitors and settings are checked before a model is loaded: where its weights cannot be, they say so if asked.
"""

import errno
import os
import shutil
from unittest.mock import Mock

import pytest
from cli_runs import assert_refused, done, run, write_folder
from tiny_runs import write_model

from hybrid_lightning.callbacks import HybridAdapterSetup, RunSummary
from hybrid_lightning.data import FileSource, PromptDataModule

PARTS = """
from pathlib import Path

from lightning.pytorch import Callback
from hybrid_lightning.data import PromptDataModule


def of_a_hint(completion, hint):
    return 1.0


class Logs(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/own", 1.0)


class Prepared(PromptDataModule):
    def prepare_data(self):
        Path("prepared.jsonl").write_text(Path("sums.jsonl").read_text())
"""
FILES = {
    **{"list.yaml": "- a\n- b\n", "foreign.ckpt": "hello", "file": ""},
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


# A command, and what the last line has to say.
COMMANDS = [
    ("", r"no command is given, such as .* fit --config FILE; --help lists all"),
    ("fit", r"model\.loss must be given, nearly always by a config: --config FILE"),
    ("fit --config nope.yaml", r"File does not exist: .*nope\.yaml"),
    ("fit --config list.yaml", r"Unexpected config: - a - b"),
    ("--config t.yaml fit", r"a config stands behind the command.*: python -m hybrid_lightning fit --config FILE"),
    ("score --config t.yaml --ckpt_path=foreign.ckpt", r"score goes on from the folder scoring of a run that was stopped"),
    ("export --config t.yaml --folder=x --form.dtype=float32", "which ExportForm, one of AdapterFolder, LoraFolder, MergedModel"),
    ("predict --config t.yaml --predictions.path=file/p.jsonl", r"file/p\.jsonl: .*/file is no folder .* another"),
    ("export --config t.yaml", r"\bfolder\b"),
    ("export --config t.yaml --folder=model", r"folder='model' is there and not empty; give a new folder"),
    ("export --config t.yaml --folder=new --ckpt_path=best.ckpt", r"there is no checkpoint best\.ckpt .*such as foreign\.ckpt"),
    ("export --config t.yaml --folder=new", r"cannot export: .* nothing was trained; give ckpt_path, or fit first"),
]
# What is added to `fit` by a config that works.
OPTIONS = [
    ("model.reward=json.dumps", r"json\.dumps is no class derived .* FunctionReward with function: json\.dumps$"),
    ("model.lr_full=abc", r'"lr_full": Expected a .*float.* value: abc'),
    ("model.loss=my_parts.NotALoss", r"my_parts\.NotALoss does not correspond to a subclass of PolicyLoss"),
    # what a user's own classes do
    (
        "model.environment=my_parts.Odd model.environment.number=0",
        r"Odd\.__init__ raised ZeroDivisionError: division by zero \(my_parts\.py line \d+\); correct it",
    ),
    (
        "model.environment=my_parts.Odd model.environment.number=1",
        r"Odd\.tools returned 'nothing'; it must return a list of JSON",
    ),
    ("model.reward=my_parts.Unready", r"Unready\.check_prompt raised SystemExit: not now \(my_parts\.py line \d+\); correct it"),
    # models and devices
    ("model.model=/nowhere", r"model '/nowhere' does not exist"),
    ("trainer.max_steps=-5", r"trainer: `max_steps` must be a non-negative integer or -1"),
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
    ("trainer.logger=false data.source.init_args.train=/nope.jsonl", r"train='/nope\.jsonl' does not exist"),
]
# Command, config and options where the model's weights cannot be loaded.
NO_WEIGHTS = "cannot load the model"
STOPPING = "trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping trainer.callbacks.monitor=val/loss"
UNLOADED = [
    # nothing, so that the weights are asked for
    ("fit t", NO_WEIGHTS),
    ("score t", NO_WEIGHTS),
    ("test t", NO_WEIGHTS),
    ("fit dpo", NO_WEIGHTS),
    # data
    ("validate t data.source.init_args.validation_fraction=0", "no validation rows, which validate needs"),
    ("fit t data.max_prompt_tokens=2", "all 24 train prompts are longer than max_prompt_tokens=2"),
    ("fit t model.sampler.max_new_tokens=200", "a prompt of 4 tokens and max_new_tokens=200 exceed the model's 128"),
    ("fit t model.prompts_per_rollout=1000", "prompts_per_rollout=1000 is more than the 24 training prompts"),
    ("fit sft data.format=PlainFormat", "has 0 completions, but SupervisedModule needs one"),
    ("fit dpo data.format.rejected={answer}", "the chosen completion is also the rejected one"),
    # reward
    ("fit t data.source.init_args.train=words.jsonl model.reward=MathMatch", "reference answer 'an answer' .* neither a number"),
    (
        "fit t model.reward=FunctionReward model.reward.function=my_parts.of_a_hint",
        "needs 'hint', but .* row 0 has no such column",
    ),
    ("predict sft", r"predict scores completions; give model\.reward"),
    # monitors
    ("fit t checkpoint.monitor=val/avg@8", "ModelCheckpoint has monitor=val/avg@8, .* one of val/greedy_accuracy, .*val/avg@2"),
    (f"fit t {STOPPING}", "EarlyStopping has monitor=val/loss, which validation does not measure"),
    ("fit sft checkpoint.monitor=val/avg@8", "monitor=val/avg@8, .* one of val/loss, val/entropy"),
    # settings
    ("fit t model.dtype=bfloat16", r"needs trainer\.precision=bf16-mixed"),
    ("fit t model.loss.kl_coef=0.1 adapter.keep_start_weights=false", r"set adapter\.keep_start_weights=true"),
    ("fit t adapter.target_modules=[foo_proj]", "'foo_proj' matches no candidate module; give one of down_proj"),
]


def written(command, config, *options):
    return " ".join([command, "--config", f"{config}.yaml", *(f"--{option}" for option in options)])


MISTAKES = [
    *COMMANDS,
    *((written("fit", "t", *options.split()), message) for options, message in OPTIONS),
    *((f"{written(*words.split())} --model.model=unreadable", message) for words, message in UNLOADED),
]


def content(folder):
    """All that is in a folder, but for what Python makes of modules."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_said_in_the_last_line_and_leaves_nothing(folder, command, message):
    before = content(folder)
    assert_refused(run(folder, *command.split()), message)
    assert content(folder) == before


def test_a_plan_of_another_model_is_refused_before_the_model_is_loaded(folder):
    write_model(folder / "gpt2", "gpt2")
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=planned", "--trainer.logger.name=gpt2"]
    done(folder, "score", "--config", "t.yaml", "--model.model=gpt2", *options)
    plan = "--adapter.plan=planned/gpt2/version_0/plan.json"
    result = run(folder, "fit", "--config", "t.yaml", "--model.model=unreadable", plan)
    assert_refused(result, r"the plan was made for gpt2 and names \S+; this model has no such module")


def test_what_a_callback_of_ones_own_logs_may_be_monitored(folder):
    options = ["--trainer.callbacks+=my_parts.Logs", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    options += ["--trainer.default_root_dir=own", "--trainer.logger=false", "--adapter.scorer=Random"]
    done(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/own")
    result = run(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/other")
    assert_refused(result, "monitor=val/other, which validation does not measure")


def test_rows_are_read_and_filtered_once_and_by_a_data_module_that_prepares_its_files_only_then(folder, monkeypatch):
    calls: list[str] = []
    for kind, name in ((FileSource, "read_tables"), (PromptDataModule, "_short_enough")):
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given, _f=original, _n=name: calls.append(f"{_n} {given[:1]}") or _f(self, *given)
        )
    options = ["--trainer.logger=false", "--trainer.default_root_dir=once", "--adapter.scorer=Random"]
    done(folder, "score", "--config", "t.yaml", *options)
    assert {"read_tables ()", "_short_enough ('train',)", "_short_enough ('validation',)"} <= set(calls)
    assert len(calls) == len(set(calls)), "nothing is done twice"
    given = ["--data=my_parts.Prepared", "--data.source.init_args.train=prepared.jsonl", "--data.format=PlainFormat"]
    done(folder, "score", "--config", "t.yaml", *options, *given)


def test_what_has_been_scored_stays(folder):
    """A reward that fails can be mended, and the run go on from the completions that there are."""
    name = "--trainer.logger.init_args.name=kept"
    result = run(folder, "fit", "--config", "t.yaml", "--model.reward=my_parts.Raising", name)
    assert_refused(result, r"reward Raising .* raised ZeroDivisionError: .*sums\.jsonl row \d+ with completion '")
    root = folder / "runs" / "kept" / "version_0"
    assert list((root / "scoring").glob("completions-*.pt")) and "my_parts.Raising" in (root / "config.yaml").read_text()
    assert not (root / "plan.json").exists() and not (root / "checkpoints").exists()


def test_a_run_that_is_interrupted_before_it_has_done_anything_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(HybridAdapterSetup, "setup", Mock(side_effect=KeyboardInterrupt))
    before = content(folder)
    assert run(folder, "fit", "--config", "t.yaml", "--trainer.logger.init_args.name=interrupted").code != 0
    assert content(folder) == before


def test_a_full_disk_is_one_line(folder, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/default/version_0/summary.json")
    monkeypatch.setattr(RunSummary, "_summary", Mock(side_effect=full))
    options = ["--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--adapter.scorer=Random"]
    result = run(folder, "fit", "--config", "t.yaml", *options, "--trainer.logger.init_args.name=full")
    assert_refused(result, r"No space left on device: '.*summary\.json'; make room, or give another place by --trainer\.logger")


def test_a_mistake_of_ours_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("hybrid_lightning.cli.check_run_folder", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        run(folder, "fit", "--config", "t.yaml")

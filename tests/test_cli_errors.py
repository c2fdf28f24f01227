"""What a user gets wrong is said in the last line, and the exit code is not 0.

What is found before a model is loaded is in `test_checked_before_loading.py`.
"""

import re
import shutil

import pytest
from cli_runs import run, write_folder
from tiny_runs import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("errors")):
        write_bad_files(folder)
        yield folder


def write_bad_files(folder):
    texts = {
        "broken.yaml": "model: {a: [1,\n b: 2",
        "list.yaml": "- a\n- b\n",
        "empty.yaml": "",
        "empty.jsonl": "",
        "no_answer.jsonl": "\n".join(f'{{"question": "{i}"}}' for i in range(30)),
        "other.json": '{"a": 1}',
        "foreign.ckpt": "hello",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xff\xfe", "answer": "2"}\n')
    for name in ("no_tokenizer", "cut"):
        shutil.copytree(folder / "model", folder / name)
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


COMMANDS = [
    ("", r"expected \"subcommand\" to be one of \{fit,validate,test,predict,score, \.\.\.\}"),
    ("frobnicate", r"invalid choice: 'frobnicate'"),
    ("fit", r"required: loss, reward"),
    ("fit --config nope.yaml", r"File does not exist: .*nope\.yaml"),
    ("fit --config broken.yaml", r"Problems parsing config: .* line 1, column 12"),
    ("fit --config list.yaml", r"a config must be a mapping such as .* but is: - a - b"),
    ("fit --config empty.yaml", r"a config must be a mapping such as .* but is empty"),
    ("score --config t.yaml --ckpt_path=x", r"score goes on from the folder scoring of a run that was stopped"),
    (
        "export --config t.yaml --folder=x --form.dtype=float32",
        r"before its argument dtype say which ExportForm, as in --form MergedModel",
    ),
    ("predict --config t.yaml --predictions.path=.", r"predictions\.path='\.' is a folder; give a file name"),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_wrong_commands(folder, command, message):
    assert_refused(run(folder, *command.split()), message)


def assert_refused(result, message):

    assert result.code != 0
    assert re.search(message, result.last), result.last
    assert result.last.startswith("error: ") and "Traceback" not in result.err


# What is added to a config that works, and what the last line has to say.
OPTIONS = [
    # names and types
    ("trainer.max_epoch=3", r"unrecognized arguments: --trainer\.max_epoch=3"),
    ("model.nonsense=1", r"Option 'nonsense' is not accepted"),
    ("model.reward=ExactMatch model.reward.bogus=3", r"Option 'bogus' is not accepted; .* --model\.reward\.help=ExactMatch"),
    ("model.reward=json.dumps", r"json\.dumps is no class derived .* FunctionReward with function: json\.dumps$"),
    ("model.reward=mine.py:close", r"mine\.py:close is no class .* FunctionReward with function: mine\.py:close$"),
    ("model.lr_full=abc", r'"lr_full": expected float\. Got value: abc'),
    ("trainer.precision=nonsense", r"one of .*'bf16-mixed'.*; got nonsense"),
    ("trainer.strategy=nonsense", r"invalid strategy name: `strategy='nonsense'`"),
    # classes
    ("model.loss=GRPOLos", r'"loss": unknown class GRPOLos; give module\.Class, or a class of ours'),
    ("model.loss=my_parts.Missing", r"module 'my_parts' has no attribute 'Missing'"),
    ("model.loss=my_parts.NotALoss", r"my_parts\.NotALoss does not correspond to a subclass of PolicyLoss"),
    ("model=my_parts.NotALoss", r"does not correspond to a subclass of LanguageModule; got my_parts\.NotALoss"),
    ("model.optimizer=torch.optim.Foo", r"module 'torch\.optim' has no attribute 'Foo'"),
    # a loss that is switched on the command line keeps the other one's clip range
    ("model.loss=GSPOLoss", r"clip_low=0\.2, clip_high=0\.25 is too large .* left over from a GRPO config: set clip_low=3e-4"),
    ("model.loss.clip_low=0.0004", r"clip_low=0\.0004, .* too small .* left over from a GSPO config: set clip_low=0\.2"),
    # values
    ("model.lr_full=-1", r"model\.lr_full must be a non-negative number, got -1"),
    ("model.schedule=CosineSchedule trainer.max_steps=-1 trainer.max_epochs=-1", r"CosineSchedule needs the run's length"),
    ("adapter.budget.share=2", r"share=2\.0: a budget is a share between 0"),
    # models, plans and checkpoints
    ("model.model=/nowhere", r"model '/nowhere' does not exist"),
    ("model.model=no_tokenizer", r"cannot load a tokenizer from 'no_tokenizer'"),
    ("model.model=cut", r"cannot load the model 'cut'"),
    ("adapter.plan=other.json", r"other\.json lacks the field"),
    ("ckpt_path=nope.ckpt", r"Checkpoint file not found: nope\.ckpt"),
    ("ckpt_path=foreign.ckpt", r"foreign\.ckpt cannot be read: it is no checkpoint, or damaged"),
    # data
    ("data.source.init_args.train=empty.jsonl", r"train='empty\.jsonl' has no rows"),
    ("data.source.init_args.train=no_answer.jsonl", r"no_answer\.jsonl has no column 'answer'.* the columns are question"),
    ("data.source.init_args.train=latin.jsonl", r"train='latin\.jsonl' cannot be read: .*utf-8"),
    # rewards
    ("model.reward=my_parts.Raising", r"reward Raising .* raised ZeroDivisionError: .*sums\.jsonl row \d+ with completion '"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_wrong_options(folder, options, message):
    assert_refused(run(folder, "fit", "--config", "t.yaml", *(f"--{option}" for option in options.split())), message)


def test_a_checkpoint_of_another_model_is_refused(folder):

    write_model(folder / "other", seed=1)
    name = "--trainer.logger.init_args.name=short"
    assert run(folder, "fit", "--config", "t.yaml", name, "--trainer.max_steps=2").code == 0
    checkpoint = folder / "runs" / "short" / "version_0" / "checkpoints" / "last.ckpt"
    for command in ("fit", "validate"):
        result = run(folder, command, "--config", "t.yaml", "--model.model=other", f"--ckpt_path={checkpoint}")
        assert_refused(result, r"the plan was made for model .* but this model has digest|belongs to a base model with digest")


def test_a_mistake_of_ours_keeps_its_traceback(folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("hybrid_lightning.trainer.Trainer.fit", fail)
    with pytest.raises(KeyError, match="a bug"):
        run(folder, "fit", "--config", "t.yaml")

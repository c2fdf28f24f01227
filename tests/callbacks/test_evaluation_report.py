"""The table, the JSON file and TensorBoard hold the same numbers of each set and of all."""

import json
import re

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import StartsWithDigit, build_policy, build_trainer, fit, write_model, write_sums

from hybrid_lightning.callbacks import EvaluationReport, RunSummary
from hybrid_lightning.data import FileSource, Mixture, PlainFormat, PromptDataModule

ROWS = ["problems", "greedy_accuracy", "greedy_reward", "avg@2", "pass@1", "pass@2", "maj@1", "maj@2"]
ROWS += ["reward", "completion_length", "truncation_rate"]
FIT = {"max_steps": 2, "num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 1}
SHARES = {name for name in ROWS if "@" in name} | {"greedy_accuracy", "truncation_rate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl", 24)
    lines = (folder / "sums.jsonl").read_text().splitlines()
    (folder / "easy.jsonl").write_text("\n".join(lines[:7]))
    (folder / "hard.jsonl").write_text("\n".join(lines[7:12]))
    (folder / "train.jsonl").write_text("\n".join(lines[12:]))
    return folder


def data(folder, named=True, split="test"):
    easy, hard, train = (str(folder / f"{name}.jsonl") for name in ("easy", "hard", "train"))
    if not named:
        return PromptDataModule(FileSource(train, validation=easy, test=hard), PlainFormat(), eval_batch_size=4)
    sources = {"easy": FileSource(**{split: easy}), "hard": FileSource(train, **{split: hard})}
    return PromptDataModule(Mixture(sources), PlainFormat(), eval_batch_size=4)


def evaluate(folder, root, command="test", named=True, **flags):
    trainer = build_trainer(root, EvaluationReport(), logger=TensorBoardLogger(root, name=""), **flags)
    policy = build_policy(folder / "model", reward=StartsWithDigit())
    getattr(trainer, command)(policy, datamodule=data(folder, named), verbose=False)
    return json.loads((root / "version_0" / "evaluation.json").read_text())


def scalars(root):
    events = EventAccumulator(str(root / "version_0")).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def cells(output):
    """Row -> its cells."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines}


def shown(values, name):
    if name == "problems":
        return f"{values[name]:.0f}"
    if name not in SHARES:
        return f"{values[name]:.3f}"
    return f"{100 * values[name]:.1f} [{100 * values[f'{name}/ci_low']:.1f}, {100 * values[f'{name}/ci_high']:.1f}]"


def test_table_file_and_tensorboard_have_the_same_numbers_of_each_set(folder, tmp_path, capsys):
    report = evaluate(folder, tmp_path)
    output = capsys.readouterr().out
    assert list(report["sets"]) == ["easy", "hard"] and report["model"] == str(folder / "model")
    assert (report["split"], report["step"], report["checkpoint"]) == ("test", None, None)
    columns = {"test/easy": report["sets"]["easy"], "test/hard": report["sets"]["hard"], "test": report["overall"]}
    logged = {name: value for name, value in scalars(tmp_path).items() if name.startswith("test/")}
    assert logged == {f"{prefix}/{name}": value for prefix, values in columns.items() for name, value in values.items()}
    assert [name for name in report["overall"] if "/" not in name] == ROWS
    assert {name.partition("/")[0] for name in report["overall"] if "/" in name} == SHARES
    table = cells(output)
    first = ["problems", "avg@2", "reward"]
    assert list(table) == [*first, *(name for name in ROWS if name not in first)]
    for name in ROWS:
        assert table[name] == [shown(values, name) for values in columns.values()]
    assert re.search(r"^Test *$", output, re.M) and re.search(r"easy +┃ +hard +┃ +mean of sets", output)
    assert f"Written to {tmp_path / 'version_0' / 'evaluation.json'}" in " ".join(output.split())
    easy, hard, overall = (values["avg@2"] for values in columns.values())
    assert overall == pytest.approx((easy + hard) / 2) and report["overall"]["problems"] == 12
    limited = evaluate(folder, tmp_path / "limited", limit_test_batches=2)["sets"]
    assert limited["easy"] == report["sets"]["easy"], "two batches of four: all of the seven easy, one hard"
    assert limited["hard"]["problems"] == 1


def test_one_set_without_a_name_is_a_column_alone(folder, tmp_path, capsys):
    report = evaluate(folder, tmp_path, "validate", named=False)
    assert report["sets"] == {} and report["split"] == "validation" and report["overall"]["problems"] == 7
    by = {"reward": "StartsWithDigit", "format": "PlainFormat", "dtype": "float32", "precision": "32-true"}
    assert report["measured_by"] == by, "what another number has to have in common to be compared"
    assert scalars(tmp_path)["val/avg@2"] == report["overall"]["avg@2"]
    assert all(row == [shown(report["overall"], name)] for name, row in cells(capsys.readouterr().out).items())


def test_a_fit_shows_named_sets_and_monitors_either_name(folder, tmp_path, capsys):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/hard/avg@2", mode="max")
    stop = EarlyStopping("val/avg@2", patience=9, mode="max")
    callbacks = (RunSummary(), EvaluationReport(), best, stop)
    policy, measured = {"reward": StartsWithDigit()}, data(folder, split="validation")
    fit(folder / "model", None, tmp_path, *callbacks, policy=policy, data=measured, enable_checkpointing=True, **FIT)
    output = capsys.readouterr().out
    assert re.search(r"^Validation \(step 2\) *$", output, re.M), "the table"
    (line,) = re.findall(r"^Validation \(step 2\): (.*)", output, re.MULTILINE)
    assert re.match(r"accuracy [\d.]+% \[[\d.]+, [\d.]+\] \(n=\d+, avg@2\)  reward [\d.]+  ", line), line
    assert re.findall(r"(\w+@\d) [\d.]+%", line) == ["pass@2", "maj@2"], "the largest of each"
    report = json.loads((tmp_path / "version_0" / "evaluation.json").read_text())
    after = json.loads((tmp_path / "version_0" / "summary.json").read_text())["validation"]["after"]
    assert report["step"] == 2 and report["sets"]["hard"]["avg@2"] == after["val/hard/avg@2"]
    assert float(best.best_model_score) >= after["val/hard/avg@2"] and stop.best_score >= after["val/avg@2"]

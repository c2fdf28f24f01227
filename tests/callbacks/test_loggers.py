"""Every kind of logger: its contents, the screen, and a second run beside the first."""

import csv
import json
import sqlite3
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cli_runs
import pytest
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_lightning.callbacks.loggers import NamingMLFlowLogger, curve_hints, logger_root

SAMPLES = ["prompt", "answer", "completion", "finished", "correct", "reward", "advantage"]
FIT = ["fit", "--config", "t.yaml", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--samples.every_n_rollouts=1"]
SEVERAL = ["--config", str(Path(__file__).parents[2] / "configs" / "logger" / "several.yaml")]  # of all kinds
NOTHING = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null", "--adapter.scorer=Random"]


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory):
    """A store with its tables, which take MLflow seconds to make, to be copied."""
    if missing := [package for package in ("wandb", "mlflow") if find_spec(package) is None]:
        pytest.skip(f"needs {missing}: pip install -e '.[wandb,mlflow]'")
    root = tmp_path_factory.mktemp("store")
    NamingMLFlowLogger(save_dir=str(root))
    return (root / "mlflow.db").read_bytes()


@pytest.fixture(scope="module")
def offline():
    """No service is asked, and none is left running."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", "")  # so that MLflow's own setting is undone
        patch.delenv("MLFLOW_TRACKING_URI")
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, offline, mlflow_store):
    """A run's folder, screen and loggers, what W&B knew of it, and the files that it had before a second, shorter run."""
    for here in cli_runs.write_folder(tmp_path_factory.mktemp("loggers")):
        there, known = set(here.iterdir()), []
        (here / "runs").mkdir()
        (here / "runs" / "mlflow.db").write_bytes(mlflow_store)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hybrid_lightning.callbacks.run_summary.curve_hints", partial(collect, known))
            result = cli_runs.done(here, *FIT, *SEVERAL)
        sys.modules["wandb"].finish()
        # Without W&B's own folder, where its service keeps writing for a while, and without MLflow's database.
        files = [path for path in (here / "runs").rglob("*") if path.is_file() and path.suffix != ".db"]
        before = {path: path.read_bytes() for path in files if "wandb" not in path.relative_to(here).parts}
        cli_runs.done(here, *FIT, *SEVERAL, *NOTHING)
        sys.modules["wandb"].finish()
        assert {path.name for path in set(here.iterdir()) - there} <= {"runs", "__pycache__"}, "nothing lies beside the runs"
        yield here / "runs" / "several", result, *known, before


def collect(known, trainer, path):
    (summary,) = [logger.experiment.summary._as_dict() for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    known += trainer.loggers, dict(summary)  # W&B forgets its summary when the run is finished
    return curve_hints(trainer, path)


def test_everything_lies_in_the_runs_own_folder_and_stays_as_it_is(runs):
    root, result, _, _, before = runs
    assert sorted(path.name for path in root.iterdir()) == ["version_0", "version_1"]
    for folder in root.iterdir():
        assert {"config.yaml", "plan.json", "summary.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert not [path for path, data in before.items() if path.read_bytes() != data]
    above = {path.name for path in root.parent.iterdir() if not path.name.startswith(".")}
    assert above == {root.name, "wandb", "mlflow.db", "mlartifacts"}
    hints = [line.partition("Curves:")[2].strip() for line in result.out.splitlines() if line.startswith("Curves:")]
    tensorboard, table, synced, mlflow = hints
    path = "runs/several/version_0"
    assert (tensorboard, table) == (f"tensorboard --logdir {path}", f"{path}/metrics.csv")
    assert synced.startswith("wandb sync runs/wandb/offline-run-") and (root.parents[1] / synced.split()[-1]).is_dir()
    assert mlflow == "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"


def read_tensorboard(folder, *_):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert tags["images"] == ["plan/scores"] and tags["histograms"] == ["rewards/histogram"]
    assert texts >= {"config", "plan", "samples"}
    (config,) = events.Tensors("config/text_summary")
    assert (folder / "config.yaml").read_text() in config.tensor_proto.string_val[0].decode()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}


def read_csv(folder, *_):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "samples.csv").open(newline="") as file:
        head, *samples = csv.reader(file)
    assert head == ["step", *SAMPLES] and len(samples) == 16 and {row[0] for row in samples} == {"0"}
    with (folder / "plan.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 14
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in rows[0]}


def read_mlflow(folder, logger, *_):
    client, run = logger.experiment, logger.experiment.get_run(logger.run_id)
    assert run.info.status == "FINISHED" and run.data.params["loss/init_args/clip_high"] == "0.25"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()
    assert (artifacts / "plan" / "scores.png").read_bytes().startswith(b"\x89PNG")
    samples = json.loads((artifacts / "samples.json").read_text())
    assert samples["columns"] == ["step", *SAMPLES] and len(samples["data"]) == 16
    assert len(json.loads((artifacts / "plan.json").read_text())["data"]) == 14
    histories = {name: client.get_metric_history(logger.run_id, name) for name in run.data.metrics}
    return {name: {point.step: point.value for point in points} for name, points in histories.items()}


def read_wandb(folder, logger, summary):
    run = logger.experiment
    config = run.config.as_dict()
    assert config["config"] == yaml.safe_load((folder / "config.yaml").read_text()) and config["lr_lora"] == 0.01
    media = folder.parents[2] / run.dir / "media"
    (table,) = (media / "table").glob("samples_*.json")
    samples = json.loads(table.read_text())
    assert samples["columns"] == SAMPLES and len(samples["data"]) == 16
    assert list((media / "table").glob("plan_*.json")) and list((media / "images" / "plan").glob("scores_*.png"))
    return {name: {None: value} for name, value in summary.items() if isinstance(value, (int, float))}


READERS = {TensorBoardLogger: read_tensorboard, CSVLogger: read_csv, NamingMLFlowLogger: read_mlflow, WandbLogger: read_wandb}


def test_it_holds_scalars_samples_the_plan_and_the_config(runs):
    root, _, loggers, of_wandb, _ = runs
    folder = root / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert {type(logger) for logger in loggers} == READERS.keys()
    for logger in loggers:
        scalars = READERS[type(logger)](folder, logger, of_wandb)
        at, low = ("_at_", "_ci_low") if isinstance(logger, MLFlowLogger) else ("@", "/ci_low")
        wanted = {"reward", "loss", "entropy", "lr/full", "grad_norm/lora", "val/greedy_accuracy", "time/step_s"}
        assert wanted | {f"val/avg{at}2", f"val/avg{at}2{low}", f"val/greedy_accuracy{low}"} <= set(scalars)
        after, avg = scalars["summary/accuracy_after"], scalars[f"val/avg{at}2"]
        assert list(after.values()) == [pytest.approx(summary["accuracy_after"])]
        assert avg[max(avg, key=lambda step: step or 0)] == pytest.approx(summary["accuracy_after"])
        assert list(scalars["summary/accuracy_before"].values()) == [pytest.approx(summary["accuracy_before"])]
        if not isinstance(logger, WandbLogger):
            assert len(avg) == 2 and avg[0] == pytest.approx(summary["accuracy_before"])
            assert list(scalars["reward"]) == [0, 1] and list(after) == [2]


def test_a_run_folder_has_the_name_of_the_project_of_the_first_logger(tmp_path, offline, mlflow_store):
    (tmp_path / "mlflow.db").write_bytes(mlflow_store)
    named = [WandbLogger(project="my/own", save_dir=tmp_path), NamingMLFlowLogger(experiment_name="sums", save_dir=str(tmp_path))]
    named += [WandbLogger(name="mine", offline=True), WandbLogger(offline=True)]  # which have neither a project nor a folder
    places = [logger_root(logger, Path("runs")) for logger in named]
    assert places == [tmp_path / "my_own", tmp_path / "sums", Path("runs", "mine"), Path("runs", "lightning_logs")]


def test_mlflow_gets_names_that_a_store_of_files_takes(tmp_path, offline, mlflow_store, monkeypatch):
    """A metric is a file there, so no name may be a folder of another."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = NamingMLFlowLogger(tracking_uri=f"file:{tmp_path}/store")
    logger.log_metrics({"val/avg@8": 1.0, "val/avg@8/ci_low": 2.0, "val/a (hard)?/avg@8": 4.0}, step=3)
    logger.log_hyperparams({"rewards": {"my@set": "x" * 1000, "plain": [1, {"a": None}]}})
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"val/avg_at_8": 1.0, "val/avg_at_8_ci_low": 2.0, "val/a _hard__/avg_at_8": 4.0}
    assert run.data.params["rewards/my_at_set"] == "x" * 250
    assert logger.save_dir == f"{tmp_path}/store", "the place that is given"


def test_of_runs_that_start_at_once_one_makes_the_tables_of_mlflow(tmp_path, offline, mlflow_store, monkeypatch):
    """MLflow by itself lets all try, and all but one fail."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_store)
    waited, make = [], MLFlowLogger.__init__

    def checked(self, **given):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".mlflow.lock").acquire(timeout=0)
        waited.append(given["experiment_name"])
        make(self, **given)

    monkeypatch.setattr(MLFlowLogger, "__init__", checked)
    loggers = [NamingMLFlowLogger(experiment_name="new", save_dir=str(tmp_path)) for _ in range(2)]
    assert waited == ["new", "new"] and loggers[0].experiment_id == loggers[1].experiment_id
    FileLock(tmp_path / ".mlflow.lock").acquire(timeout=0).lock.release()


# ---- Trackio


def test_trackio_has_scalars_tables_and_the_config_of_a_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="needs trackio: pip install -e '.[trackio]'")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # which reads the folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    for here in cli_runs.write_folder(tmp_path):
        given = ["--trainer.logger=TrackioLogger", "--trainer.logger.project=sums", "--samples.prompts=null"]
        result = cli_runs.done(here, *FIT, *given, "--samples.completions=null", "--adapter.scorer=Random")
    assert "Curves:     trackio show --project sums\n" in result.out and "* " not in result.out and trackio
    with sqlite3.connect(next((tmp_path / "store").glob("*.db"))) as store:
        (config,) = store.execute("select config from configs").fetchone()
        logged = [(step, json.loads(metrics)) for step, metrics in store.execute("select step, metrics from metrics")]
    assert json.loads(config)["config"]["trainer"]["max_steps"] == 2 and json.loads(config)["lr_full"] == 0.001
    curves = {(name, step): value for step, metrics in logged for name, value in metrics.items()}
    assert {("reward", 0), ("reward", 1), ("val/avg@2", 1), ("plan", 0), ("plan/scores", 0)} <= curves.keys()
    (table,) = [value["_value"] for (name, _), value in curves.items() if name == "samples"]
    assert list(table[0]) == SAMPLES and len(table) == 4 * 4, "all of the rollout"

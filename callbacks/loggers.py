"""Code specific to each logger: TensorBoard, CSV, Weights & Biases, MLflow and Trackio.

Scalars and hyperparameters reach every logger through Lightning; loggers of other kinds get nothing else. This file adds tables,
pictures and texts, under names that each logger accepts, and finds the folders in which loggers keep their files.
"""

import csv
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import LOWER, UPPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SQLITE = "sqlite:///"


# ---- where a logger keeps its files


def keeps_files_in_a_version(logger: Logger) -> bool:
    """Whether a logger writes into a folder ROOT/NAME/version_N."""
    return isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in str(logger.save_dir)


def given_version(logger: Logger) -> int | str | None:
    """The version that was given to a logger with versions; its property `version` would choose one."""
    return logger._version if isinstance(logger, (TensorBoardLogger, CSVLogger)) and keeps_files_in_a_version(logger) else None


def logger_root(logger: Logger, fallback: Path) -> Path:
    """The folder that holds one folder per run of a logger; below `fallback` if the logger has no folder on this machine."""
    if isinstance(logger, (TensorBoardLogger, CSVLogger)) and keeps_files_in_a_version(logger):
        return Path(os.path.expanduser(os.path.expandvars(logger.root_dir)))
    root = logger.save_dir
    local = fallback if root in (None, ".") or "://" in str(root) else Path(str(root))  # "." is the default of WandbLogger
    if isinstance(logger, MLFlowLogger):
        name: Any = logger._experiment_name  # the property `name` is a number and queries the store
    else:
        name = logger.name
        if isinstance(logger, WandbLogger) and name == "lightning_logs":  # the default without a project
            name = logger._name or name
    return local / (name if name and isinstance(name, str) else "default").replace("/", "_")


def has_begun(logger: Logger) -> bool:
    """Whether a logger has already begun to write."""
    return getattr(logger, "_experiment", None) is not None


def write_into_version(loggers: Sequence[Logger], version: int | str) -> None:
    """Make loggers that have not begun to write use the folder of a version, which exists and is empty."""
    new = [logger for logger in loggers if keeps_files_in_a_version(logger) and not has_begun(logger)]
    for logger in new:
        logger._version = version  # type: ignore[attr-defined]
        if isinstance(logger, CSVLogger):
            _ = logger.experiment  # begin now: it warns if its folder holds files of other loggers


# ---- what loggers receive


def log_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Add a page of rows to the table of each logger, on the first process only.

    TensorBoard shows the page as Markdown. A logger without steps for tables gets a leading column `step`.
    """
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, rows), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger) and rows:
            content = {"step": [step] * len(rows), **{column: [row[i] for row in rows] for i, column in enumerate(columns)}}
            logger.experiment.log_table(logger.run_id, content, f"{name}.json")  # appends
        elif isinstance(logger, TrackioLogger):
            import trackio

            logger.experiment.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir, f"{name}.csv")
            head = [] if path.exists() else [["step", *columns]]
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([*head, *([step, *row] for row in rows)])


# Escapes for every character that Markdown or HTML would read as markup, and for line breaks, since a row must be one line.
_AS_TEXT = str.maketrans({**{c: f"&#{ord(c)};" for c in "&<>|\\`*_{}[]()#+-!~"}, "\n": "<br>", "\r": None})


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown: numbers with three digits, texts verbatim, whatever markup they contain."""

    def shown(cell: Any) -> str:
        text = "" if cell is None else str(cell).translate(_AS_TEXT)
        return f"{cell:.3g}" if isinstance(cell, float) else text or "*(empty)*"

    lines = [columns, ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def log_figure(trainer: Trainer, name: str, figure: "Figure", step: int) -> None:
    """Log a picture; the CSV logger has none."""
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{name}.png")
        elif isinstance(logger, TrackioLogger):
            import trackio
            from PIL import Image

            figure.savefig(picture := BytesIO(), format="png")
            logger.experiment.log({name: trackio.Image(Image.open(picture))}, step=step)


def log_histogram(trainer: Trainer, name: str, values: torch.Tensor, step: int) -> None:
    """Log the distribution of values to loggers that have histograms."""
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, step)
        elif isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({name: wandb.Histogram(values.tolist()), "trainer/global_step": step})


def log_config(trainer: Trainer, path: Path) -> None:
    """Log the config file of the run; a CSV log already has it in its folder."""
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("config", f"```yaml\n{path.read_text(encoding='utf-8')}\n```", 0)
        elif isinstance(logger, (WandbLogger, TrackioLogger)):
            # Not as a file: W&B itself writes a file of this name.
            logger.log_hyperparams({"config": yaml.safe_load(path.read_text(encoding="utf-8"))})
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path))


def log_numbers(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Log scalars to every logger immediately, whatever `log_every_n_steps` says."""
    for logger in trainer.loggers if values else ():
        logger.log_metrics(dict(values), step)


def show_hyperparameters(
    trainer: Trainer, compared: Mapping[str, Any], others: Mapping[str, Any], metrics: Sequence[str]
) -> None:
    """Write TensorBoard's page of hyperparameters.

    `compared` holds plain values for the first columns; they replace `others` of the same name, which may be nested. `metrics`
    are the scalars shown as results, which the page must know in advance.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = {**compared, **_sanitize_params(_flatten_dict(_convert_params(dict(others)))), **compared}
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
                logger.experiment._get_file_writer().add_summary(summary, 0)


def curve_hints(trainer: Trainer, folder: Path) -> list[str]:
    """For each logger, what to type or open to see the curves of a run."""
    return [hint for logger in trainer.loggers if (hint := _hint(logger, folder))]


def _hint(logger: Logger, folder: Path) -> str | None:
    if isinstance(logger, TensorBoardLogger):
        return shlex.join(["tensorboard", "--logdir", str(folder if keeps_files_in_a_version(logger) else logger.log_dir)])
    if isinstance(logger, CSVLogger):
        return str(Path(logger.log_dir, "metrics.csv"))
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return shlex.join(["wandb", "sync", from_here(Path(run.dir).parent)]) if logger._offline else run.url
    if isinstance(logger, MLFlowLogger):
        uri = logger._tracking_uri
        if uri.startswith(_SQLITE):
            uri = f"{_SQLITE}{from_here(Path(uri.removeprefix(_SQLITE)))}"
        return uri if uri.startswith("http") else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    if isinstance(logger, TrackioLogger):
        space = f"https://huggingface.co/spaces/{logger.space_id}"
        return shlex.join(["trackio", "show", "--project", logger.name]) if logger.space_id is None else space
    return None


def from_here(path: Path) -> str:
    """A path as the user types it: short below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _loggers(trainer: Trainer) -> Sequence[Logger]:
    """The loggers on the first process; none on the others."""
    return trainer.loggers if trainer.is_global_zero else ()


# ---- MLflow


class NamingMLFlowLogger(MLFlowLogger):
    """Lightning's `MLFlowLogger` with names that every store of MLflow accepts, and a store that MLflow still supports.

    The command line makes it wherever a config names `MLFlowLogger`. In names, `@` becomes `_at_`. Some stores keep a metric as a
    file, so that `val/x` and `val/x/ci_low` cannot both exist: the ends of an interval become `val/x_ci_low` and `val/x_ci_high`.
    Without a `tracking_uri` (or `MLFLOW_TRACKING_URI`) runs go into `SAVE_DIR/mlflow.db`, because MLflow refuses Lightning's
    default, a plain folder.

    Args:
        tracking_uri: URI of the store; None takes `sqlite:///SAVE_DIR/mlflow.db`. As in Lightning, the default is the environment
            variable at the time of import, since MLflow later sets the variable to the store in use.
        save_dir: A local folder.
        artifact_location: Folder for artifacts; None takes the folder `mlartifacts` beside a SQLite file.
        arguments: The other arguments of Lightning's `MLFlowLogger`.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = os.getenv("MLFLOW_TRACKING_URI"),
        save_dir: str | None = "./mlruns",
        artifact_location: str | None = None,
        **arguments: Any,
    ) -> None:
        uri = tracking_uri or f"{_SQLITE}{Path(save_dir or '.') / 'mlflow.db'}"
        given = {"tracking_uri": uri, "save_dir": save_dir, "artifact_location": artifact_location, **arguments}
        self._folder = Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else None
        if self._folder is None:
            super().__init__(**given)
            return
        # Absolute: MLflow keeps the store of a relative path open after the folder has changed, and `mlflow ui` works anywhere.
        given["tracking_uri"] = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
        given["artifact_location"] = artifact_location or (self._folder.absolute() / "mlartifacts").as_uri()
        # Processes may start at the same time, such as the ranks of a run. The lock lets only one make the tables and experiment.
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder of MLflow's store cannot be made: {error}; give another place by --trainer.logger.save_dir=FOLDER"
            ) from error
        with FileLock(self._folder / ".mlflow.lock"):
            super().__init__(**given)
            if self._mlflow_client.get_experiment_by_name(self._experiment_name) is None:
                self._mlflow_client.create_experiment(self._experiment_name, self._artifact_location)

    @property
    def save_dir(self) -> str | None:
        """The folder of the store if it is on this machine."""
        return super().save_dir if self._folder is None else str(self._folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics under names that MLflow accepts."""
        super().log_metrics({_mlflow_name(name): value for name, value in metrics.items()}, step)

    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters under names that MLflow accepts; Lightning cuts values after 250 characters."""
        super().log_hyperparams({_mlflow_name(name): value for name, value in _flatten_dict(_convert_params(params)).items()})


def _mlflow_name(name: str) -> str:
    for bound in (LOWER, UPPER):
        if name.endswith(f"/{bound}"):
            name = f"{name.removesuffix(f'/{bound}')}_{bound}"
    return re.sub(r"[^\w/. -]", "_", name.replace("@", "_at_"), flags=re.ASCII)


# ---- Trackio


class TrackioLogger(Logger):
    """Logs to Trackio: its database on this machine, in the folder TRACKIO_DIR, or a Space of the Hugging Face hub.

    Args:
        project: The project that groups runs for comparison.
        run_name: Name of the run; None lets Trackio make one up.
        space_id: Space that shows the runs, such as `me/runs`, created if it does not exist; None keeps them on this machine.
            The token comes from HF_TOKEN or `hf auth login`.

    Raises:
        ConfigError: If Trackio is not installed.
    """

    def __init__(self, project: str = "hybrid_lightning", run_name: str | None = None, space_id: str | None = None) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise ConfigError("TrackioLogger needs trackio; pip install 'hybrid-lightning[trackio]'")
        self._project, self._run_name, self.space_id = project, run_name, space_id
        self._config: dict[str, Any] = {}
        self._experiment: Any = None
        self._resume = "never"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run. The first access begins it, or continues it if it has ended."""
        if self._experiment is None:
            import trackio

            given: dict[str, Any] = {"space_id": self.space_id, "config": self._config, "embed": False}
            with redirect_stdout(StringIO()):  # the end of the screen shows how to see the run
                self._experiment = trackio.init(self._project, self._run_name, resume=self._resume, **given)
            self._run_name, self._resume = self._experiment.name, "allow"
        return self._experiment

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name; None before the run has begun, if no name was given."""
        return self._run_name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters. Trackio takes a config when a run begins or is continued."""
        # Trackio reserves names with a leading underscore; LightningCLI has one.
        self._config |= {name: value for name, value in _convert_params(params).items() if not name.startswith("_")}
        self.finalize("running")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write pending data."""
        if self._experiment is not None:
            with redirect_stdout(StringIO()):
                self._experiment.finish()
            self._experiment = None

"""All access to private parts of Lightning's Trainer.

If a version of Lightning has moved such a name, the run ends with a message that names the version and the remedy.
`tests/test_other_libraries.py` lists these names, and the private names of all other libraries in use.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import lightning

from hybrid_lightning.errors import TrainingError


def _of_lightning(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*given: Any) -> Any:
        try:
            return function(*given)
        except AttributeError as error:
            raise TrainingError(
                f"Lightning {lightning.__version__} does not have what {function.__name__} needs ({error}); install a supported "
                "version: pip install 'lightning>=2.6,<2.7'"
            ) from error

    return called


@_of_lightning
def ends_step(trainer: Any) -> bool:
    """Whether the current micro-batch is the last one of an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


@_of_lightning
def validation_follows(trainer: Any) -> bool:
    """Whether Lightning validates after the current micro-batch."""
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


@_of_lightning
def logged_step(trainer: Any) -> int:
    """The step that Lightning logs under."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


@_of_lightning
def log_under(trainer: Any, step: int) -> None:
    """Make Lightning log under this step."""
    _ = trainer.fit_loop.epoch_loop._batches_that_stepped
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


@_of_lightning
def restore_signal_handlers(trainer: Any) -> None:
    """Restore the signal handlers that Lightning has replaced, as it does itself at the end of the run."""
    trainer._signal_connector.teardown()


@_of_lightning
def name_checkpoint(trainer: Any, path: Any) -> None:
    """Set `trainer.ckpt_path` for this run only. The public setter would also set it for later runs of the Trainer."""
    _ = trainer._checkpoint_connector._ckpt_path
    trainer._checkpoint_connector._ckpt_path = path


@_of_lightning
def attach(trainer: Any, module: Any, datamodule: Any) -> None:
    """Connect a module and its data with the Trainer, as at the beginning of each Trainer command."""
    trainer._data_connector.attach_data(module, datamodule=datamodule)
    trainer.strategy.connect(module)


@_of_lightning
def train_batches(trainer: Any) -> int:
    """Micro-batches of an epoch; also right while the train dataloader is loaded, when `num_training_batches` is outdated."""
    return int(trainer.fit_loop._combined_loader.limits[0])


@_of_lightning
def drop_train_loader(trainer: Any) -> None:
    """Make Lightning rebuild the train dataloader."""
    _ = trainer.fit_loop._combined_loader
    trainer.fit_loop._combined_loader = None


@_of_lightning
def forget_metrics(trainer: Any, names: Sequence[str]) -> None:
    """Remove logged metrics of a step from the metrics that Lightning keeps showing and passes to callbacks."""
    for name in names:
        trainer._results.pop(f"training_step.{name}", None)
        trainer._logger_connector._callback_metrics.pop(name, None)

from types import SimpleNamespace

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_lightning.callbacks import TensorBoardOverview


def build_trainer(tmp_path, accumulating, metrics):
    return SimpleNamespace(
        fit_loop=SimpleNamespace(_should_accumulate=lambda: accumulating),
        global_step=2,
        log_every_n_steps=1,
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        loggers=[TensorBoardLogger(tmp_path, name="run", version=0)],
        is_global_zero=True,
        state=SimpleNamespace(fn="fit"),
    )


def read(tmp_path):
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_overview_comes_first_and_holds_training_and_validation(tmp_path):
    metrics = {"reward": 0.5, "entropy": 2.0, "time/generate_s": 9.0, "time/step_s": 12.0, "val/avg@8": 0.25, "val/reward": 7.0}
    metrics |= {"val/avg@8/ci_low": 0.125, "val/quiz/avg@8": 0.75}
    trainer, overview = build_trainer(tmp_path, True, metrics), TensorBoardOverview()
    overview.on_train_batch_end(trainer, None, None, None, 0)
    trainer.fit_loop._should_accumulate = lambda: False
    trainer.global_step = 3  # nothing is written between optimizer steps
    overview.on_train_batch_end(trainer, None, None, None, 0)
    overview.on_validation_end(trainer, None)
    trainer.loggers[0].experiment.add_scalar("accuracy", 1.0, 3)
    trainer.loggers[0].experiment.flush()
    scalars = read(tmp_path)
    assert min(scalars).startswith("0_overview/")
    assert {tag: values for tag, values in scalars.items() if "/" in tag} == {
        "0_overview/3 reward": [(3, 0.5)],
        "0_overview/7 entropy": [(3, 2.0)],
        "0_overview/10 time step_s": [(3, 12.0)],
        "0_overview/1 val avg@8": [(3, 0.25)],
    }

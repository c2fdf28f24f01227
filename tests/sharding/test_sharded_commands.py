"""Sharded checkpoints from the command line: written and resumed by two processes, tested by one."""

import cli_runs
import pytest
import torch
from ranks_of_tests import run

from hybrid_lightning.sharding.sharded_folder import read_folder

FSDP2 = ["--trainer.strategy=hybrid_lightning.sharding.FSDP2Strategy", "--trainer.devices=2"]
FSDP2 += ["--trainer.strategy.save_distributed_checkpoint=true"]
FSDP1 = ["--trainer.strategy=hybrid_lightning.sharding.FSDP1Strategy", "--trainer.devices=2"]
FSDP1 += ["--trainer.strategy.state_dict_type=sharded"]
CONFIG = ["fit", "--config", "t.yaml", "--trainer.num_sanity_val_steps=0", "--trainer.logger.name=sums"]
CONFIG += ["--trainer.limit_val_batches=0", "--adapter.calibration_prompts=4"]
TWO_BEST = ["--checkpoint.monitor=step", "--checkpoint.mode=max", "--checkpoint.save_top_k=2"]
EVERY_STEP = [*TWO_BEST, "--checkpoint.every_n_train_steps=1"]


def commands(folder, lines):
    """Run commands on a rank, one after another; what each wrote last to the error output."""
    results = [cli_runs.run(folder, *line) for line in lines]
    assert all(result.code == 0 for result in results), [result.err[-2000:] for result in results]


@pytest.fixture
def there(tmp_path):
    yield from cli_runs.write_folder(tmp_path)


def test_checkpoints_are_folders_from_which_runs_go_on(there, tmp_path):
    """A run of four steps under FSDP2, and one that goes on from its third under FSDP1; one process tests it."""
    runs = there / "runs" / "sums"
    third, last = runs / "version_0" / "checkpoints" / "step=3.ckpt", runs / "version_0" / "checkpoints" / "last.ckpt"
    first = [*CONFIG, *FSDP2, *EVERY_STEP]
    second = [*CONFIG, *FSDP1, *EVERY_STEP, "--checkpoint.save_last=link", "--ckpt_path", third]
    run(2, tmp_path / "ranks", commands, folder=there, lines=[first, second])
    # ModelCheckpoint keeps its best and last as folders.
    steps = {path.name: read_folder(path)["global_step"] for path in last.parent.iterdir()}
    assert steps == {"last.ckpt": 4, "step=3.ckpt": 3, "step=4.ckpt": 4}
    linked = runs / "version_1" / "checkpoints" / "last.ckpt"
    assert {path.name for path in linked.parent.iterdir()} == {"last.ckpt", "step=4.ckpt"}
    assert linked.is_symlink() and linked.resolve() == linked.with_name("step=4.ckpt")
    torch.testing.assert_close(read_folder(linked)["state_dict"], read_folder(last)["state_dict"])
    one = ["--config", runs / "version_0" / "config.yaml", "--trainer.strategy=auto", "--trainer.devices=1"]
    result = cli_runs.run(there, "test", *one, "--ckpt_path", linked)
    assert result.code == 0 and "greedy_accuracy" in result.out, result.err[-2000:]

"""Sharded checkpoints from the command line: written by two processes, resumed, tested and exported by one."""

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


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    yield from cli_runs.write_folder(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def runs(there, tmp_path_factory):
    """Folders of a run of four steps, and of one that goes on from its third, with another strategy."""
    first = [*CONFIG, *FSDP2, *EVERY_STEP]
    third = "runs/sums/version_0/checkpoints/step=3.ckpt"
    second = [*CONFIG, *FSDP1, *EVERY_STEP, "--checkpoint.save_last=link", "--ckpt_path", third]
    run(2, tmp_path_factory.mktemp("ranks"), commands, folder=there, lines=[first, second])
    return there / "runs" / "sums"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_model_checkpoint_keeps_its_best_and_last_as_folders(runs):
    folder = runs / "version_0" / "checkpoints"
    assert names(runs / "version_0") == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    steps = {path.name: read_folder(path)["global_step"] for path in folder.iterdir()}
    assert steps == {"last.ckpt": 4, "step=3.ckpt": 3, "step=4.ckpt": 4}
    resumed = runs / "version_1" / "checkpoints"
    assert names(runs / "version_1") == ["last.ckpt", "step=4.ckpt"]
    assert (resumed / "last.ckpt").is_symlink() and (resumed / "last.ckpt").resolve() == resumed / "step=4.ckpt"


def test_a_run_goes_on_from_a_folder(there, runs):
    """Under FSDP1 in `runs`, and here in one process, from the folder and from the link."""
    weights = read_folder(runs / "version_0" / "checkpoints" / "last.ckpt")["state_dict"]
    torch.testing.assert_close(read_folder(runs / "version_1" / "checkpoints" / "last.ckpt")["state_dict"], weights)
    config = str(runs / "version_0" / "config.yaml")
    one = ["--trainer.strategy=auto", "--trainer.devices=1"]
    result = cli_runs.run(
        there, "fit", "--config", config, *one, "--ckpt_path", runs / "version_0" / "checkpoints" / "step=3.ckpt"
    )
    assert result.code == 0, result.err[-2000:]
    resumed = torch.load(runs / "version_2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 4 and resumed["state_dict"].keys() == weights.keys()
    linked = runs / "version_1" / "checkpoints" / "last.ckpt"
    result = cli_runs.run(there, "test", "--config", config, *one, "--ckpt_path", linked)
    assert result.code == 0 and "greedy_accuracy" in result.out, result.err[-2000:]

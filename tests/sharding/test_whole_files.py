"""A checkpoint file is there whole or not at all."""

import os
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from ranks_of_tests import start, wait

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.sharding.checkpoints import WholeFiles, write_whole_files


def save_until_killed(path):
    """Save once, then be killed when half of the next file is on the disk."""
    files = WholeFiles()
    files.save_checkpoint({"number": 1}, path)
    write = torch.save

    def half(content, file):
        write(content, file)
        file.flush()
        os.ftruncate(file.fileno(), file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    files.save_checkpoint({"number": 2, "weights": torch.zeros(10_000)}, path)


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "saved" / "last.ckpt"
    (process,) = processes = start(1, tmp_path, save_until_killed, path=path)
    wait(processes, timeout_s=120)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [file.name for file in path.parent.glob("*.ckpt")] == ["last.ckpt"], "nothing else looks like a checkpoint"
    WholeFiles().save_checkpoint({"number": 3}, path)
    assert torch.load(path, weights_only=True) == {"number": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"], "what was left has been written over"
    own = type("Own", (TorchCheckpointIO,), {})  # a user's own way of writing stays
    for kind, left in ((TorchCheckpointIO, WholeFiles), (own, own)):
        write_whole_files(strategy := SimpleNamespace(checkpoint_io=kind()))
        assert type(strategy.checkpoint_io) is left


def test_a_disk_without_room_leaves_the_old_file_alone(tmp_path):
    path, weights = tmp_path / "last.ckpt", torch.zeros(100_000)
    WholeFiles().save_checkpoint({"number": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a full disk, but with another number
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt could not be written: .*too large; an earlier checkpoint is unchanged"
        ):
            WholeFiles().save_checkpoint({"weights": weights}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"], "no partial file takes up room"

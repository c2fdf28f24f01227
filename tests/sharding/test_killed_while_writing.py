"""A rank that is killed while a sharded checkpoint is written leaves none that only looks whole, and the last one goes on."""

import os
import random
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks_of_tests import start, wait
from runs_of_tests import KILLED, assert_goes_on, train_each
from test_a_rank_dies import Heard
from test_checkpoints_cross import SHARDED

from hybrid_lightning.sharding.sharded_folder import read_folder


class DieWhileWriting(Callback):
    """Kills the process of a rank in the middle of a write.

    Args:
        rank: That dies.
        name: End of the file, or name of the folder, that it waits for the disk to have.
        time: How often that has happened when it dies; of the file half is there then.
    """

    def __init__(self, rank, name, time):
        self.rank, self.name, self.time = rank, name, time

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            flush, os.fsync = os.fsync, lambda file: self.die(file) or flush(file)

    def die(self, file):
        path = os.readlink(f"/proc/self/fd/{file}")
        if not path.endswith(self.name):
            return
        self.time -= 1
        if self.time == 0:
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


# Every step writes two checkpoints: the best one, and the last one in the place of that of the step before.
MOMENTS = {
    "part of a rank": ("fsdp2 sharded", 1, "__1_0.distcp", random.Random(1).randrange(3, 9)),
    "what is not split": ("fsdp1 sharded", 0, "meta.pt", random.Random(2).randrange(3, 9)),
    "names are exchanged": ("fsdp2 sharded", 0, "/saved", 2 * random.Random(3).randrange(2, 5)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_looks_whole_is_and_goes_on(folder, tmp_path, unstopped, moment):
    strategy, rank, name, time = MOMENTS[moment]
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_last=True)
    callbacks = (saver, DieWhileWriting(rank, name, time), Heard(tmp_path / "heard"))
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": SHARDED[strategy], "devices": 2}
    jobs = {"killed": {**KILLED, "callbacks": callbacks}}
    processes = start(2, tmp_path / "ranks", train_each, jobs=jobs, **arguments)
    wait(processes, timeout_s=50)
    assert processes[rank].exitcode == -signal.SIGKILL and processes[1 - rank].exitcode == 1

    steps = {path: read_folder(path)["global_step"] for path in (tmp_path / "saved").glob("*.ckpt")}
    written = time if name == "/saved" else time - 1
    assert max(steps.values()) == (written + 1) // 2 and min(steps.values()) == written // 2
    heard = (tmp_path / "heard").read_text()
    assert heard.startswith(f"rank {1 - rank} lost contact with another rank")
    named = heard.rpartition("--ckpt_path ")[2]
    assert named in {str(path) for path in steps}

    last = max(steps, key=steps.get)
    assert_goes_on(folder, tmp_path, last, steps[last], unstopped)

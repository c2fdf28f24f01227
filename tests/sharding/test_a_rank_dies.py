"""A rank that is killed ends the run of all, soon and with a message; the last checkpoint is whole and goes on."""

import os
import random
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks_of_tests import start, wait
from runs_of_tests import ADAM, KILLED, STRATEGIES, assert_goes_on, train, train_each
from test_checkpoints_cross import SHARDED
from tiny_models import build_tokenizer
from vllm_fake_server import MODEL, FakeServer

from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.callbacks.graceful_stop import lost_contact
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.sharding.sharded_folder import read_folder


class Die(Callback):
    """Kills the process of a rank, while it generates or before an update."""

    def __init__(self, rank, batch=None, token=None):
        self.rank, self.batch, self.token, self.batches, self.tokens = rank, batch, token, 0, 0

    def on_train_start(self, trainer, pl_module):
        self.mine = trainer.global_rank == self.rank
        pl_module.generation_listeners.append(self.listen)

    def listen(self, running, decoded, total):
        self.tokens += 1
        if self.mine and self.tokens == self.token:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if self.mine and self.batches == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class DieWhileWriting(Callback):
    """Kills a rank as it waits the n-th time for the disk to have what ends with this name; of a file half is there then."""

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


class Heard(GracefulStop):
    """Keeps what is printed."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __reduce__(self):
        return Heard, (self.path,)

    def on_exception(self, trainer, pl_module, exception):
        self.path.write_text(lost_contact(trainer, exception) or "nothing")


def killed_run(folder, tmp_path, strategy, rank, *callbacks, **options):
    """Let a rank be killed, and the other one hear of it and end; what it says."""
    jobs = {"killed": {**KILLED, **options, "callbacks": (*callbacks, Heard(tmp_path / "heard"))}}
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": strategy, "devices": 2}
    processes = start(2, tmp_path / "ranks", train_each, jobs=jobs, **arguments)
    wait(processes, timeout_s=50)
    assert processes[rank].exitcode == -signal.SIGKILL and processes[1 - rank].exitcode == 1
    heard = (tmp_path / "heard").read_text()
    assert heard.startswith(f"rank {1 - rank} lost contact: rank {rank} died")
    return heard


@pytest.mark.parametrize(("strategy", "rank", "when"), [("fsdp2", 0, {"token": 10})], ids=str)
def test_the_others_stop_and_the_last_checkpoint_goes_on(folder, tmp_path, unstopped, strategy, rank, when):
    saver = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max"
    )
    heard = killed_run(folder, tmp_path, STRATEGIES[strategy], rank, saver, Die(rank, **when))
    message = (tmp_path / "ranks" / f"{1 - rank}.error").read_text().splitlines()[-1]
    assert "RuntimeError" in message or "DistBackendError" in message, message
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    assert heard.endswith(f"--ckpt_path {checkpoint}")
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 1 <= steps < 6
    assert_goes_on(folder, tmp_path, checkpoint, steps, unstopped)


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
def test_with_rollouts_under_way_on_a_server_too_which_the_run_that_goes_on_begins_again(folder, tmp_path):
    server = FakeServer(build_tokenizer(), MODEL.config)
    server.delay, server.seeded = 0.2, True  # completions follow from their seeds, whatever the weights
    sampler = VLLMServerSampler(urls=[server.url], max_new_tokens=6, top_p=0.999, timeout=10, give_up_after=5)  # compares nothing
    policy = {**ADAM, "prompts_per_rollout": 4, "minibatches_per_rollout": 1, "rollouts_ahead": 2, "sampler": sampler}
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    try:
        whole = train(folder, tmp_path / "whole", **{**KILLED, "policy": policy, "enable_checkpointing": False})
        heard = killed_run(folder, tmp_path, "ddp", 0, saver, Die(0, batch=4), policy=policy)
        (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
        assert heard.endswith(f"--ckpt_path {checkpoint}")
        job = {**KILLED, "policy": policy, "enable_checkpointing": False, "ckpt_path": checkpoint}
        rest = train(folder, tmp_path / "rest", **job)
    finally:
        server.stop()
    assert rest["global_step"] == 6 and len(rest["steps"]) == 4
    torch.testing.assert_close(rest["weights"], whole["weights"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sharded_checkpoint_that_looks_whole_is_and_goes_on(folder, tmp_path, unstopped, moment):
    strategy, rank, name, time = MOMENTS[moment]
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_last=True)
    heard = killed_run(folder, tmp_path, SHARDED[strategy], rank, saver, DieWhileWriting(rank, name, time))
    steps = {path: read_folder(path)["global_step"] for path in (tmp_path / "saved").glob("*.ckpt")}
    written = time if name == "/saved" else time - 1
    assert max(steps.values()) == (written + 1) // 2 and min(steps.values()) == written // 2
    assert heard.rpartition("--ckpt_path ")[2] in {str(path) for path in steps}
    last = max(steps, key=steps.get)
    assert_goes_on(folder, tmp_path, last, steps[last], unstopped)

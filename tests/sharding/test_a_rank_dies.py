"""A rank that is killed ends the run of all, soon and with a message; the last checkpoint is whole and can be resumed."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from cli_runs import write_folder
from fork_server import Forked
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from long_cases import long_but
from ranks_of_tests import start, wait
from runs_of_tests import ADAM, STRATEGIES, train, train_each
from test_checkpoints_cross import SHARDED, content_of
from tiny_models import build_tokenizer
from vllm_fake_server import MODEL, FakeServer

from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.callbacks.graceful_stop import lost_contact
from hybrid_lightning.rollout import VLLMServerSampler

RUN = {  # two rollouts of two steps
    "policy": {**ADAM, "prompts_per_rollout": 4},
    "enable_checkpointing": True,
    "max_steps": 4,
    "limit_val_batches": 0,
}


DIES = """
import os, signal
from lightning.pytorch import Callback

signal.alarm(90)  # if nothing else ends it

class Dies(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 0 and trainer.global_step == 2:
            os.kill(os.getpid(), 9)
"""


class Die(Callback):
    """Kills the process of the first rank, while it generates or before an update."""

    def __init__(self, batch=None, token=None):
        self.batch, self.token, self.batches, self.tokens = batch, token, 0, 0

    def on_train_start(self, trainer, pl_module):
        self.first = trainer.global_rank == 0
        pl_module.run.listeners.append(self.listen)

    def listen(self, running, decoded, total):
        self.tokens += 1
        if self.first and self.tokens == self.token:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if self.first and self.batches == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class DieWhileWriting(Callback):
    """Kills a rank as it waits the n-th time for a file with this ending to be on disk, when half of the file is there."""

    def __init__(self, rank, name, time):
        self.rank, self.name, self.time = rank, name, time

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            flush, os.fsync = os.fsync, lambda file: self.die(file) or flush(file)

    def die(self, file):
        path = os.readlink(f"/proc/self/fd/{file}")
        self.time -= path.endswith(self.name)
        if self.time == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


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
    """Let a rank be killed, and the other one hear of it and end; the checkpoint that it names, of those that are there."""
    jobs = {"killed": {**RUN, **options, "callbacks": (*callbacks, Heard(tmp_path / "heard"))}}
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": strategy, "devices": 2}
    processes = start(2, tmp_path / "ranks", train_each, jobs=jobs, **arguments)
    wait(processes, timeout_s=120)
    assert processes[rank].exitcode == -signal.SIGKILL and processes[1 - rank].exitcode == 1
    heard = (tmp_path / "heard").read_text()
    assert heard.startswith(f"rank {1 - rank} lost contact: rank {rank} died")
    (named,) = (path for path in (tmp_path / "saved").glob("*.ckpt") if heard.endswith(f"--ckpt_path {path}"))
    return named


def assert_goes_on(folder, root, checkpoint, steps, whole, **options):
    """One process resumes a killed run's checkpoint of this many steps, and ends like a run that was not stopped."""
    assert 1 <= steps < whole["global_step"]
    rest = train(folder, root / "rest", **{**RUN, **options, "enable_checkpointing": False, "ckpt_path": checkpoint})
    assert (rest["global_step"], len(rest["steps"])) == (whole["global_step"], whole["global_step"] - steps)
    torch.testing.assert_close(rest["weights"], whole["weights"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def unstopped(folder, tmp_path_factory):
    return train(folder, tmp_path_factory.mktemp("unstopped"), **{**RUN, "enable_checkpointing": False})


def test_the_others_stop_and_the_last_checkpoint_resumes(folder, tmp_path, unstopped):
    saver = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max"
    )
    checkpoint = killed_run(folder, tmp_path, STRATEGIES["fsdp2"], 0, saver, Die(token=10))
    message = (tmp_path / "ranks" / "1.error").read_text().splitlines()[-1]
    assert "RuntimeError" in message or "DistBackendError" in message, message
    assert_goes_on(folder, tmp_path, checkpoint, torch.load(checkpoint, weights_only=True)["global_step"], unstopped)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
def test_with_rollouts_under_way_on_a_server_too_and_the_resumed_run_begins_them_again(folder, tmp_path):
    server = FakeServer(build_tokenizer(), MODEL.config)
    server.delay, server.seeded = 0.2, True  # completions follow from their seeds, whatever the weights
    sampler = VLLMServerSampler(urls=[server.url], max_new_tokens=6, top_p=0.999, timeout=10, give_up_after=5)  # compares nothing
    policy = {**RUN["policy"], "minibatches_per_rollout": 1, "rollouts_ahead": 2, "sampler": sampler}
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    try:
        whole = train(folder, tmp_path / "whole", **{**RUN, "policy": policy, "max_steps": 5, "enable_checkpointing": False})
        checkpoint = killed_run(folder, tmp_path, "ddp", 0, saver, Die(batch=3), policy=policy, max_steps=5)
        assert_goes_on(folder, tmp_path, checkpoint, 2, whole, policy=policy, max_steps=5)
    finally:
        server.stop()


@pytest.mark.parametrize(("rank", "name", "time"), long_but([(1, "__1_0.distcp", 5), (0, "meta.pt", 4)], 1))
def test_a_sharded_checkpoint_that_looks_whole_is_whole_and_resumes(folder, tmp_path, unstopped, rank, name, time):
    """Every step writes two checkpoints: the best one, and the last one, which replaces the last one of the step before."""
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_last=True)
    killed_run(folder, tmp_path, SHARDED, rank, saver, DieWhileWriting(rank, name, time))
    steps = {path: content_of(path)["global_step"] for path in (tmp_path / "saved").glob("*.ckpt")}
    assert max(steps.values()) == time // 2 and min(steps.values()) == (time - 1) // 2
    last = max(steps, key=steps.get)
    assert_goes_on(folder, tmp_path, last, steps[last], unstopped)


@pytest.mark.long
def test_all_end_where_connections_do_not_break_as_between_gpus(tmp_path):
    """Rank 1 waits without end for the sum of gradients."""
    next(folder := write_folder(tmp_path))
    (tmp_path / "dies.py").write_text(DIES)
    strategy = '--trainer.strategy={"class_path": "benchmarks.faults.silent.SilentDDP"}'
    options = ["--trainer.devices=2", strategy, "--trainer.callbacks+=dies.Dies", "--checkpoint.every_n_train_steps=1"]
    options += ["--checkpoint.monitor=step", "--trainer.limit_val_batches=0"]
    command = [sys.executable, "-m", "hybrid_lightning", "fit", "--config=t.yaml", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = Forked(command, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()  # which ends with the last process that can write
    folder.close()
    assert process.returncode == -signal.SIGKILL
    named = "rank 1 ends: rank 0, which started it, has ended; .*; resume with:\n.*/last.ckpt"
    assert re.search(named, said), said

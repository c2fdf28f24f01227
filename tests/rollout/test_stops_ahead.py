"""Runs with rollouts ahead that are stopped at moments drawn over their whole life, and go on to the same bits."""

import contextlib
import os
import random
import signal
import sys
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Log, build_adapter, build_data, build_policy, build_trainer, trained

from hybrid_lightning.adapters import Random
from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.callbacks.graceful_stop import last_checkpoint
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.policy.generation import Generation
from hybrid_lightning.rollout import Sampler, VLLMServerSampler

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Noted(Log):
    """What each optimizer step was made of, and each validation."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = batch.sequences.completion_ids[batch.sequences.completion_mask].tolist()
        rest = {name: float(value) for name, value in trainer.callback_metrics.items() if name in self.compared}
        self.found[trainer.global_step] = (float(outputs["loss"]), tokens, rest)

    def on_validation_end(self, trainer, pl_module):
        self.found["val", trainer.global_step] = {n: float(v) for n, v in trainer.callback_metrics.items() if "val/" in n}


class Moment:
    """Sends a signal at the n-th call of a function of this package in the main thread, while `GracefulStop` handles it."""

    def __init__(self, stop, number=0, call=10**9):
        self.signals, self.number, self.call, self.calls, self.where = stop.signals, number, call, 0, ""

    def __enter__(self):
        sys.setprofile(self.count)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def count(self, frame, event, _):
        if event == "call" and "/hybrid_lightning/" in frame.f_code.co_filename and self.signals.taken_over:
            self.calls += 1
            if self.calls == self.call:
                self.where = f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"
                os.kill(os.getpid(), self.number)


def run(model, sums, root, sampler, compared, number=0, call=10**9, ckpt=None):
    """One run: how it ended, what it noted, how many calls there were, its weights, and the checkpoint to go on from."""
    torch.manual_seed(11)
    noted, stop, error = Noted(), GracefulStop(), None
    noted.compared = compared
    policy = build_policy(
        model, sampler=sampler(), rollouts_ahead=2, correction=TokenTruncation(), minibatches_per_rollout=2, seed=3
    )
    saver = ModelCheckpoint(every_n_train_steps=3, save_last=True)
    flags = {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    trainer = build_trainer(root, stop, build_adapter(scorer=Random()), noted, saver, **flags)
    with Moment(stop, number, call) as moment:
        try:
            trainer.fit(policy, datamodule=build_data(sums, validation_fraction=0.2), ckpt_path=ckpt)
        except (SystemExit, RolloutError) as ended:
            error = ended
    stopped = sorted(root.glob("version_*/checkpoints/stopped.ckpt"), key=os.path.getmtime)[-1:]
    left = stopped[0] if stopped and (ckpt is None or stopped[0] != ckpt) else last_checkpoint(trainer)
    return error, noted.found, moment, trained(policy), left


def chain(model, sums, root, sampler, compared, whole, seed, stops, server=None):
    """A run that is stopped so many times, at calls drawn over what is left of it, and goes on to the end."""
    draws, checkpoint, left, found, places = random.Random(seed), None, whole[2].calls, {}, []
    for number in [*(SIGNALS[draws.randrange(3)] for _ in range(stops)), 0]:
        call = draws.randrange(1, left) if number else 10**9
        began = time.monotonic()
        error, noted, moment, weights, after = run(model, sums, root, sampler, compared, number, call, checkpoint)
        places.append((moment.where, number, list(noted)[-1:], time.monotonic() - began, repr(error)))
        if number and moment.where:
            assert isinstance(error, SystemExit) and error.code == 128 + number, (places, error)
        for step, values in noted.items():
            assert found.setdefault(step, values) == values, (step, places)
        checkpoint, left = after, max(2, left - moment.calls) if noted else left
        if error is None:
            break
    return found, weights, places


def test_x(model, sums, tmp_path, start, monkeypatch):
    monkeypatch.setattr(Generation, "_compare", lambda *_: None)
    server = start(delay=0.02, seeded=True)
    import os as _os
    for name, sampler, compared in (
        ("sampler", lambda: Sampler(6), ("sampling/weights_version_lag", "sampling/importance_weight/mean")),
        ("server", lambda: VLLMServerSampler(urls=[server.url], max_new_tokens=6, timeout=10, give_up_after=0.5), ()),
    ):
        (tmp_path/name).mkdir()
        whole = run(model, sums, tmp_path/name, sampler, compared)
        for seed in eval(_os.environ["SEEDS"]):
            root = tmp_path / name / str(seed)
            root.mkdir()
            began = time.monotonic()
            found, weights, places = chain(model, sums, root, sampler, compared, whole, seed, 8)
            sys.stderr.write(f"{name} {seed} {time.monotonic() - began:.1f} {len(places)}\n" + "".join(f"   {p}\n" for p in places))
            ok = found == whole[1] and all((weights[n] == w).all() for n, w in whole[3].items())
            if not ok:
                for k in whole[1]:
                    if found.get(k) != whole[1][k]: sys.stderr.write(f"DIFF {k} { {n: (v, whole[1][k].get(n)) for n, v in found[k].items() if whole[1][k].get(n) != v} if isinstance(k, tuple) else 0}\n")
                sys.stderr.write("BAD\n")

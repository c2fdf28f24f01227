"""Runs with rollouts ahead that are stopped at moments drawn over their whole life, and go on to the same bits."""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, trained

from hybrid_lightning.adapters import Random
from hybrid_lightning.callbacks import GracefulStop, StepTimer
from hybrid_lightning.callbacks.graceful_stop import last_checkpoint
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.policy.generation import Generation
from hybrid_lightning.rollout import Sampler, VLLMServerSampler

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("before training", "generate", "reward", "logprobs", "update", "other", "checkpoint", "validation")
DIES = "the server dies"
LAG = ("sampling/weights_version_lag", "sampling/importance_weight/mean")


class Noted(Callback):
    """What each optimizer step was made of, and each validation."""

    def __init__(self, *metrics):
        super().__init__()
        self.metrics_of_steps, self.steps, self.has_begun = metrics, {}, False

    def on_train_start(self, trainer, pl_module):
        self.has_begun = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = batch.sequences.completion_ids[batch.sequences.completion_mask].tolist()
        found = [float(trainer.callback_metrics[name]) for name in self.metrics_of_steps]
        self.steps[trainer.global_step] = (float(outputs["loss"]), tokens, found)

    def on_validation_end(self, trainer, pl_module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.steps["validation", trainer.global_step] = found


class Moment:
    """Does something at the n-th call of a function of this package in a phase of the run, while `GracefulStop` handles signals.

    It counts those in the main thread.
    """

    def __init__(self, phase, call, action):
        self.phase, self.call, self.action, self.calls, self.came = phase, call, action, Counter(), 0.0

    def during(self, policy, signals, noted):
        """Count from now on."""

        def count(frame, *_):
            if "/hybrid_lightning/" in frame.f_code.co_filename and signals.taken_over:
                phase = policy.clock._running[-1] if noted.has_begun else "before training"
                self.calls[phase] += 1
                if phase == self.phase and self.calls[phase] == self.call:
                    self.came = time.monotonic()
                    self.action()

        sys.settrace(count)


def run(model, sums, root, sampler, metrics, checkpoint, moment):
    """What ended the run if not its last step, what it noted, its weights, and the checkpoint from which to go on."""
    torch.manual_seed(11)
    noted, stop, error = Noted(*metrics), GracefulStop(), None
    policy = build_policy(
        model, sampler=sampler(), rollouts_ahead=2, correction=TokenTruncation(), minibatches_per_rollout=2, seed=3
    )
    saver = ModelCheckpoint(every_n_train_steps=2, save_last=True)
    flags = {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    callbacks = (StepTimer(), stop, build_adapter(scorer=Random()), noted, saver)
    trainer, data = build_trainer(root, *callbacks, **flags), build_data(sums, validation_fraction=0.2)
    moment.during(policy, stop.signals, noted)
    try:
        trainer.fit(policy, datamodule=data, ckpt_path=checkpoint)
    except (SystemExit, RolloutError) as ended:
        error = ended
    finally:
        sys.settrace(None)
    stopped = sorted(root.glob("version_*/checkpoints/stopped.ckpt"), key=os.path.getmtime)[-1:]
    after = stopped[0] if error is not None and stopped and stopped[0] != checkpoint else last_checkpoint(trainer)
    return error, noted.steps, trained(policy), after


@pytest.mark.filterwarnings("ignore:.*is left out:UserWarning")
@pytest.mark.parametrize(("kind", "seed"), [("in turns", 0), ("servers", 0)])
def test_stopped_at_any_moment_of_its_life_a_run_goes_on_to_the_same_bits(model, sums, tmp_path, start, monkeypatch, kind, seed):
    metrics, phases, sampler, server = LAG, [*PHASES], lambda: Sampler(6), None
    if kind == "servers":  # which make the same completions whatever their weights, and when they are asked again
        monkeypatch.setattr(Generation, "_compare", lambda *_: None)
        metrics, phases, server = (), [*PHASES, DIES], start(delay=0.03, seeded=True)
        sampler = lambda: VLLMServerSampler(urls=[server.url], max_new_tokens=6, timeout=10, give_up_after=0.4)  # noqa: E731
    (tmp_path / "whole").mkdir()
    whole = Moment("", 0, None)
    error, expected, weights, _ = run(model, sums, tmp_path / "whole", sampler, metrics, None, whole)
    assert error is None and set(expected) == {*range(1, 9), ("validation", 4), ("validation", 8)}
    draws, checkpoint = random.Random(seed), None
    draws.shuffle(phases)
    for phase in [*phases, ""]:
        number, within, error = draws.choice(SIGNALS), "update" if phase == DIES else phase, None
        action = server.stop if phase == DIES else lambda number=number: os.kill(os.getpid(), number)
        while error is None:
            moment = Moment(within, 1 + draws.randrange(whole.calls[within] // 8 or 1), action)
            error, steps, reached, checkpoint = run(model, sums, tmp_path, sampler, metrics, checkpoint, moment)
            assert all(expected[step] == made for step, made in steps.items()), phase
            if error is None:
                assert all(torch.equal(weight, weights[name]) for name, weight in reached.items())
                if not phase:
                    return
                checkpoint = None  # the moment has not come in what was left, but will in another life
        assert time.monotonic() - moment.came < 5, phase
        assert isinstance(error, RolloutError) if phase == DIES else error.code == 128 + number, phase
        if phase == DIES:
            server.start()


class Interrupt(Callback):
    """What Ctrl-C does where no callback handles signals, as in a notebook, once a server has requests."""

    def __init__(self, server):
        self.server = server

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        until = time.monotonic() + 5
        while not self.server.running and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
@pytest.mark.parametrize("meanwhile", ["completions", "weights", "completions of a rollout ahead"])
def test_a_stop_ends_within_seconds_what_a_server_that_answers_nothing_was_asked_for(
    model, sums, tmp_path, start, monkeypatch, meanwhile
):
    monkeypatch.setattr(Generation, "_compare", lambda *_: None)
    server, handler, stop = start(seeded=True), signal.getsignal(signal.SIGINT), GracefulStop()
    sampler, came = VLLMServerSampler(urls=[server.url], max_new_tokens=6), []
    answer, begin = server.on_inference_v1_generate, server.on_start_weight_update
    if meanwhile == "weights":
        server.on_start_weight_update = lambda body: (came.append(body), server.stopped.wait(60), begin(body))[2]
    else:
        first = 4 if "ahead" in meanwhile else 0  # requests of a rollout

        def late(body):
            came.append(body)
            server.delay = 60 if len(came) > first else 0
            return answer(body)

        server.on_inference_v1_generate = lambda body: late(body) if body else answer(body)
    callbacks = [Interrupt(server)] if "ahead" in meanwhile else [stop]

    def signalled():
        while not came:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    if "ahead" not in meanwhile:
        threading.Thread(target=signalled, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            fit(model, sums, tmp_path, *callbacks, policy={"sampler": sampler, "rollouts_ahead": 2})
        assert time.monotonic() - began < 8
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores after Ctrl-C
    assert meanwhile == "weights" or server.ended
    assert not [thread.name for thread in threading.enumerate() if thread.name == "requests to vLLM servers"]

"""Runs with rollouts ahead that are stopped at random moments of their whole life, and resume bit-exactly."""

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
from long_cases import long_but
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, trained

from hybrid_lightning.adapters import Random
from hybrid_lightning.callbacks import GracefulStop, StepTimer
from hybrid_lightning.callbacks.graceful_stop import last_checkpoint
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.rollout import Sampler, VLLMServerSampler

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ["before training", "generate", "reward", "logprobs", "checkpoint", "update", "other", "validation"]
DIES = "the server dies"
LAG = ("sampling/weights_version_lag", "sampling/importance_weight/mean")


class Life(Callback):
    """Notes what the steps of a run were made of, and acts at the n-th call of functions of this package in a phase."""

    def __init__(self, metrics, phase="", call=0, action=None):
        super().__init__()
        self.metrics, self.phase, self.call, self.action = metrics, phase, call, action
        self.steps, self.calls, self.has_begun, self.came = {}, Counter(), False, 0.0

    def on_train_start(self, trainer, pl_module):
        self.has_begun = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = batch.sequences.completion_ids[batch.sequences.completion_mask].tolist()
        found = [float(trainer.callback_metrics[name]) for name in self.metrics]
        self.steps[trainer.global_step] = (float(outputs["loss"]), tokens, found)

    def on_validation_end(self, trainer, pl_module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.steps["validation", trainer.global_step] = found

    def run(self, model, sums, root, sampler, checkpoint):
        """The cause of its end unless it was the last step, its weights, and the checkpoint to resume from."""
        torch.manual_seed(11)
        stop, error = GracefulStop(), None
        policy = {"sampler": sampler(), "rollouts_ahead": 1, "minibatches_per_rollout": 2, "seed": 3}
        policy = build_policy(model, correction=TokenTruncation(), **policy)
        saver = ModelCheckpoint(every_n_train_steps=2, save_last=True)
        flags = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None, "enable_checkpointing": True}
        trainer = build_trainer(root, StepTimer(), stop, build_adapter(scorer=Random()), self, saver, **flags)

        def count(frame, *_):
            if "/hybrid_lightning/" in frame.f_code.co_filename and stop.signals.taken_over:
                phase = policy.run.clock._running[-1] if self.has_begun else "before training"
                self.calls[phase] += 1
                if phase == self.phase and self.calls[phase] == self.call:
                    self.came = time.monotonic()
                    self.action()

        sys.settrace(count)
        try:
            trainer.fit(policy, datamodule=build_data(sums, validation_fraction=0.2), ckpt_path=checkpoint)
        except (SystemExit, RolloutError) as ended:
            error = ended
        finally:
            sys.settrace(None)
        stopped = sorted(root.glob("version_*/checkpoints/stopped.ckpt"), key=os.path.getmtime)[-1:]
        after = stopped[0] if error is not None and stopped and stopped[0] != checkpoint else last_checkpoint(trainer)
        return error, trained(policy), after


@pytest.mark.filterwarnings("ignore:.*is left out:UserWarning")
@pytest.mark.parametrize("kind", long_but(["in turns", "servers"], 0))
def test_a_run_stopped_at_any_moment_resumes_bit_exactly(model, sums, tmp_path, start, kind):
    metrics, phases, sampler, server = LAG, PHASES[1::2], lambda: Sampler(6), None
    if kind == "servers":  # which make the same completions whatever their weights, and when they are asked again
        metrics, phases, server = (), [*PHASES, DIES], start(delay=0.03, seeded=True)
        sampler = lambda: VLLMServerSampler(urls=[server.url], max_new_tokens=6, timeout=600, give_up_after=0.4)  # noqa: E731
    (tmp_path / "whole").mkdir()
    whole = Life(metrics)
    error, weights, _ = whole.run(model, sums, tmp_path / "whole", sampler, None)
    assert error is None and set(whole.steps) == {*range(1, 7), ("validation", 3), ("validation", 6)}
    draws, checkpoint = random.Random(0), None
    for phase in [*draws.sample(phases, len(phases)), ""]:
        number, within, error = draws.choice(SIGNALS), "update" if phase == DIES else phase, None
        action = server.stop if phase == DIES else lambda number=number: os.kill(os.getpid(), number)
        while error is None:
            life = Life(metrics, within, 1 + draws.randrange(whole.calls[within] // 8 or 1), action)
            error, reached, checkpoint = life.run(model, sums, tmp_path, sampler, checkpoint)
            assert all(whole.steps[step] == made for step, made in life.steps.items()), phase
            if error is None:
                assert all(torch.equal(weight, weights[name]) for name, weight in reached.items())
                if not phase:
                    return
                checkpoint = None  # the moment has not come in what was left, but will in another life
        assert time.monotonic() - life.came < 60, phase
        assert isinstance(error, RolloutError) if phase == DIES else error.code == 128 + number, phase
        if phase == DIES:
            server.start()


class Interrupt(Callback):
    """Ctrl-C where no callback handles signals, as in a notebook, once a server has requests."""

    def __init__(self, server):
        self.server = server

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        until = time.monotonic() + 60
        while not self.server.running and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
@pytest.mark.parametrize("meanwhile", ["weights", "completions of a rollout ahead"])
def test_a_stop_ends_at_once_what_a_server_that_answers_nothing_was_asked_for(model, sums, tmp_path, start, meanwhile):
    server, handler, stop = start(seeded=True), signal.getsignal(signal.SIGINT), GracefulStop()
    sampler, came = VLLMServerSampler(urls=[server.url], max_new_tokens=6), []
    answer, begin = server.on_inference_v1_generate, server.on_start_weight_update
    if meanwhile == "weights":
        server.on_start_weight_update = lambda body: (came.append(body), server.stopped.wait(600), begin(body))[2]
    else:

        def late(body):
            if "logprobs" in body.get("sampling_params", ()):  # it is to complete
                came.append(body)
                server.delay = 600 if len(came) > 4 else 0  # requests of a rollout
            return answer(body)

        server.on_inference_v1_generate = late
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
        assert time.monotonic() - began < 100
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores after Ctrl-C
    assert meanwhile == "weights" or server.ended
    assert not [thread.name for thread in threading.enumerate() if thread.name == "requests to vLLM servers"]

"""An engine with other weights than the policy's is detected, whatever it reports; one that dies or hangs ends the run soon."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny_runs import Log, build_adapter, fit
from vllm_of_tests import Server, needs_vllm, wait_at_most, write_model

from hybrid_lightning.adapters import Random
from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.vllm import dispatch, servers
from hybrid_lightning.rollout.vllm.dispatch import STARTED

pytestmark = [
    needs_vllm,
    pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning", "ignore:.*is left out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*differ from the policy's by:UserWarning"),
]


class After(Log):
    """Notes metrics, and does something after an optimizer step."""

    def __init__(self, step=0, action=lambda trainer: None):
        super().__init__()
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *arguments):
        super().on_train_batch_end(trainer, *arguments)
        if trainer.global_step == self.step:
            self.action(trainer)


@pytest.fixture
def train(model, sums, tmp_path):
    def run(sampler, *callbacks, steps=8, ckpt=None, model=model, rate=0.03):
        policy = {"sampler": sampler, "rollouts_ahead": 1, "lr_lora": rate, "lr_full": rate}
        return fit(model, sums, tmp_path, *callbacks, policy=policy, max_steps=steps, ckpt=ckpt)

    return run


def freeze_what_is_sent(monkeypatch, trainer):
    """Send the policy's present weights at all later updates, under their labels."""
    policy, stream = trainer.lightning_module.policy, CurrentWeights.stream
    sent = {}
    for weight in CurrentWeights(policy.model, policy.weights, "", 0, True).stream(True):
        sent[weight.name] = torch.empty(weight.shape)
        weight.write_rows(sent[weight.name], 0)

    def old(weight):
        return replace(weight, write_rows=lambda to, first: to.copy_(sent[weight.name][first : first + len(to)]))

    monkeypatch.setattr(CurrentWeights, "stream", lambda self, everything: map(old, stream(self, everything)))


@pytest.mark.parametrize("rate", [0.03, 3e-4])
def test_updates_that_break_after_the_start_end_the_run(train, server, monkeypatch, rate):
    breaks = After(2, lambda trainer: freeze_what_is_sent(monkeypatch, trainer))
    with pytest.raises(RolloutError, match=r"differ from the policy's by .* with the same weights: they agreed before"):
        train(VLLMServerSampler(max_new_tokens=8, urls=[server.url]), breaks, steps=60, rate=rate)
    assert 2 < len(breaks.metrics) < 20


def change_what_is_sent(monkeypatch, change):
    """Change the policy's weights in place on their way to the engine."""
    stream = CurrentWeights.stream

    def changed(weight):
        return replace(weight, write_rows=lambda to, first: (weight.write_rows(to, first), change(to)))

    monkeypatch.setattr(CurrentWeights, "stream", lambda self, everything: map(changed, stream(self, everything)))


def test_a_resumed_run_finds_a_server_of_zeros_before_it_trains(train, server, tmp_path, monkeypatch):
    path, log = tmp_path / "saved.ckpt", Log()
    saves = After(4, lambda trainer: trainer.save_checkpoint(path))
    train(VLLMServerSampler(max_new_tokens=8, urls=[server.url]), saves)
    change_what_is_sent(monkeypatch, torch.Tensor.zero_)
    with pytest.raises(RolloutError, match=r"with the same weights: they agreed before, .* has not taken the weights of"):
        train(VLLMServerSampler(max_new_tokens=8, urls=[server.url]), log, ckpt=path)
    assert not log.metrics


def test_a_server_of_another_model_by_noise_is_refused_where_only_the_adapter_is_sent(train, server, monkeypatch):
    sampler, log = VLLMServerSampler(max_new_tokens=8, urls=[server.url]), Log()
    with monkeypatch.context() as patch:
        change_what_is_sent(patch, lambda to: to.add_(torch.randn(to.shape) * 0.15 * to.std()))
        with pytest.raises(RolloutError, match="it has another model"):
            train(sampler)
    sampler._servers[0].set_label(STARTED)  # as after a start with those weights
    with pytest.raises(
        RolloutError, match=r"differ from the policy's by 0\.\d+ nats .*: it has another model, or does not support"
    ):
        train(VLLMServerSampler(max_new_tokens=8, urls=[server.url], sync="adapter"), log, build_adapter(0.0, scorer=Random()))
    assert not log.metrics


def test_a_server_that_hangs_ends_the_run_in_time_and_one_that_comes_back_is_used(train, tmp_path, monkeypatch):
    """A server of experts, which gets the policy's frozen ones again when it was started again in the middle of a run."""
    monkeypatch.setattr(dispatch, "_LOOK_S", 2.0)  # where completions are under way, and where weights are to be sent
    monkeypatch.setattr(servers, "_FIRST_S", 2.0)
    model = write_model(tmp_path / "model", "qwen3_moe")
    own, began = Server(model, tmp_path / "log.txt"), []

    def sampler():
        return VLLMServerSampler(max_new_tokens=40, urls=[own.url], give_up_after=240)

    def hang(trainer):
        began.append(time.monotonic())
        os.killpg(own._process.pid, signal.SIGSTOP)
        wait_at_most(trainer.lightning_module.task.generation.sampler, 6)

    def again(trainer):
        own.stop()
        threading.Thread(target=own.start).start()

    try:
        log = After(2, again)
        train(sampler(), log, steps=5, model=model)
        assert len(log.metrics) == 5 and all(step["sampling/mismatch/max"] < 1e-3 for step in log.metrics)
        # Found by the rollout under way, or, where that had ended, by the next update.
        with pytest.raises(RolloutError, match=rf"(completes for 6 s|tried for \d+ s).*{own.url}") as raised:
            train(sampler(), GracefulStop(), After(2, hang), steps=9, model=model)
        assert time.monotonic() - began[0] < 200, "where a request may take ten minutes"
        assert "Checkpoint saved" in "".join(raised.value.__notes__)
        os.killpg(own._process.pid, signal.SIGCONT)
        (checkpoint,) = tmp_path.rglob("stopped.ckpt")
        made, log = torch.load(checkpoint, weights_only=False)["global_step"], After()
        train(sampler(), log, steps=made + 2, model=model, ckpt=checkpoint)
        assert made >= 2 and len(log.metrics) == 2
    finally:
        own.stop()

"""Runs with vLLM servers that are watched: whether they compute what the policy computes, and whether they answer."""

import json
import re
import threading

import pytest
from lightning.pytorch import Callback
from long_cases import long_but
from tiny_runs import Log, Talk, fit

from hybrid_lightning.callbacks import Diagnosis, GracefulStop, RunSummary
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.vllm import dispatch, outage

pytestmark = pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning", "ignore:.*is left out:UserWarning")
EPISODES = {
    "environment": Talk(),
    "episodes": EpisodeLimits(max_turns=2, max_tokens=24),
    "turn_template": "{content}",
    "reward": None,
}
VERSIONS = []


async def talks(row, client):
    """The conversation of `Talk` as an agent."""
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        answer = await client.chat.completions.create(model="policy", messages=messages)
        VERSIONS.append(answer.system_fingerprint)
        text = answer.choices[0].message.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"n{len(text)}"}]
    return len(text) / 10


AGENT = {**EPISODES, "environment": None, "agent": talks}


class After(Callback):
    """Does something after an optimizer step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action()


@pytest.fixture
def train(model, sums, tmp_path):
    """Trains by large steps, with servers that make up their completions."""

    def run(*servers, callbacks=(), steps=4, rate=0.1, sampler=(), ckpt=None, **policy):
        options = {"max_new_tokens": 6, "timeout": 600, "give_up_after": 30, **dict(sampler)}
        policy["sampler"] = VLLMServerSampler(urls=[server.url for server in servers], **options)
        policy |= {"lr_lora": rate, "lr_full": rate}
        return fit(model, sums, tmp_path, *callbacks, policy=policy, max_steps=steps, ckpt=ckpt)

    return run


@pytest.mark.parametrize(("ahead", "correction"), long_but([(0, None), (1, TokenTruncation()), (2, None)], 1))
def test_a_server_that_keeps_its_weights_is_found_after_any_update_and_an_honest_one_is_not(train, start, ahead, correction):
    def run(server, rate=0.1, *callbacks):
        log, steps = Log(), 4 if rate == 0.1 else 12
        options = {
            "callbacks": [log, *callbacks],
            "rollouts_ahead": ahead,
            "correction": correction,
            "rate": rate,
            "steps": steps,
        }
        return log, lambda: train(start(seeded=True), server, **options)

    log, fitted = run(start(seeded=True))
    fitted()
    assert all(step["sampling/mismatch/mean"] <= step["sampling/mismatch/max"] < 1e-4 for step in log.metrics)
    assert len(log.metrics) == 4
    liar = start(seeded=True)
    breaks = After(1, lambda: setattr(liar, "loses_weights", True))
    log, fitted = run(liar, 0.1, breaks)
    with pytest.raises(RolloutError, match=f"of {liar.url} differ .* with the same weights: they agreed before"):
        fitted()
    assert len(log.metrics) < 4
    liar.loses_weights = False
    log, fitted = run(liar, 1e-4, breaks)
    with (
        pytest.warns(
            UserWarning,
            match=rf"of {liar.url} differ .* at step \d, more than 0\.0001; see .* explain vllm .*at 0\.05",
        ),
        pytest.raises(RolloutError, match=r"they agreed before, to .*, so it has not taken the weights of the last updates"),
    ):
        fitted()
    assert 1e-4 < log.metrics[-1]["sampling/mismatch/mean"] < 0.05 and 2 < len(log.metrics) < 12


def test_a_run_that_is_resumed_while_updates_do_not_arrive_says_so(train, start, tmp_path):
    server = start(seeded=True)
    stops = (GracefulStop(), After(1, lambda: setattr(server, "loses_weights", True)))
    with pytest.warns(UserWarning, match="differ from the policy's by"), pytest.raises(RolloutError, match="they agreed before"):
        train(server, callbacks=stops, steps=12, rate=1e-4)
    (checkpoint,) = tmp_path.rglob("stopped.ckpt")
    with (
        pytest.warns(UserWarning, match="differ from the policy's by"),
        pytest.raises(RolloutError, match=r"they agreed before, .* so it has not taken the weights of the last updates"),
    ):
        train(server, steps=24, rate=1e-4, ckpt=checkpoint)


def test_the_verdict_names_an_engine_that_has_other_weights_first(train, start, tmp_path):
    server, two = start(seeded=True), (RunSummary(), Diagnosis())
    breaks = After(1, lambda: setattr(server, "loses_weights", True))
    with pytest.warns(UserWarning, match="differ from the policy's by") as warned:
        train(server, callbacks=[*two, breaks], steps=3, rate=1e-4)
    assert len([entry for entry in warned if "differ from the policy's by" in str(entry.message)]) == 2, "as long as it lasts"
    (summary,) = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert re.match(rf"completions were made by other weights .*{server.url} differ from the policy's by 0", summary["verdict"])
    assert summary["try"][0].startswith("start the engine again with the policy's model")


def at_request(server, number, action):
    """Do something when a server gets one of its requests, counted from now on."""
    answer, calls = server.on_inference_v1_generate, []

    def acts(body):
        calls.append(body)
        if len(calls) == number:
            acting = threading.Thread(target=action)
            acting.start()
            acting.join()
        return answer(body)

    server.on_inference_v1_generate = acts


@pytest.mark.parametrize(
    ("ahead", "fault", "asked", "step", "policy"),
    long_but(
        [
            (0, "dies", "takes the policy's weights .tried for", 2, {}),
            (0, "hangs", "completes for", 2, {}),
            (1, "dies", "completes for", 2, {}),
            (2, "hangs", "(completes for|takes the policy's weights .tried for)", 2, {}),  # both wait, for one time
            (0, "dies", "completes for", 0, {}),  # in the calibration
            (0, "dies", "completes for", 2, EPISODES),
            (1, "dies", "completes for", 2, AGENT),
        ],
        0,
        5,
        6,
    ),
)
def test_servers_that_do_not_answer_are_reported_at_once_and_end_the_run_once(
    train, start, ahead, fault, asked, step, policy, monkeypatch, caplog
):
    """Where completions are under way the run ends with them, and does not wait as long again to send the next weights."""
    monkeypatch.setattr(outage, "_GRACE_S", 0.1)
    monkeypatch.setattr(outage, "_AGAIN_S", 0.5)
    monkeypatch.setattr(dispatch, "_LOOK_S", 1.0)
    server, log = start(seeded=True), Log()
    fails = {"dies": server.stop, "hangs": lambda: setattr(server, "hangs", True)}[fault]
    if "completes" in asked:
        fails = lambda fails=fails: at_request(server, 6, fails)  # noqa: E731  # after those that are compared
    if not step:
        fails()
    with caplog.at_level("INFO", "lightning.pytorch"), pytest.raises(RolloutError, match=f"no vLLM server {asked} 5 s") as raised:
        train(server, callbacks=[log, After(step, fails)], steps=9, rollouts_ahead=ahead, sampler={"give_up_after": 5}, **policy)
    assert bool(log.metrics) == bool(step)
    assert server.url in str(raised.value) and "stopped.ckpt" not in str(raised.value), "whoever writes the checkpoint reports it"
    lines = [line for line in caplog.messages if "no server answers, tried for up to 5 s" in line and server.url in line]
    assert 2 <= len(lines) < 11 and not any("answers again" in line for line in caplog.messages)


@pytest.mark.parametrize(("ahead", "policy"), [(0, {}), (1, {}), (0, EPISODES), (1, AGENT)])
def test_a_server_that_is_started_again_in_the_middle_of_a_rollout_completes_it(train, start, ahead, policy):
    server, log = start(seeded=True), Log()
    at_request(server, 20, server.restart)
    train(server, callbacks=[log], rollouts_ahead=ahead, **policy)
    assert len(log.metrics) == 4 and "model.embed_tokens.weight" in server.updates[0], "all weights"
    if "agent" in policy:
        assert {"step-0", "step-1"} <= set(VERSIONS), "each answer names the weights that sampled it"

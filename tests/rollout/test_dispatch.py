"""Which servers complete which prompts, and servers that are slow, die, hang, or have other weights by then."""

import asyncio
import contextlib
import threading
import time
from functools import partial

import pytest
import torch
from vllm_fake_server import ENGINE, PLAIN, Weights, begin_rollout, complete, shares

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.interface import MessageRequest, SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.vllm import dispatch, server_client
from hybrid_lightning.types import Prompt


def test_a_rollout_is_what_the_servers_answer_and_told_of_as_it_arrives(start, build):
    told = {}
    begun = begin_rollout(build(start(), start(), weights=Weights(3)), [[3, 5], [4], [6, 7, 8]], on_completion=told.__setitem__)
    begun.wait()
    assert sorted(told) == list(range(6)), "before anybody asks for them"
    rollouts = begun.result()
    tokens = rollouts.sequences.completion_ids
    assert tokens.tolist() == [[10, 2, 1], [10, 3, 1], [6, 2, 1], [6, 3, 1], [12, 2, 1], [12, 3, 1]]
    torch.testing.assert_close(rollouts.sampling_logprobs, tokens * -0.5)
    assert rollouts.finished.all() and rollouts.completions == tuple(told[row] for row in range(6))


class Talks:
    """An episode of three messages with tokens added between; number 1 pauses after its first message."""

    def __init__(self, number, ids, paused):
        self.number, self.ids, self.paused, self.messages = number, ids, paused, []

    async def play(self, ask):
        for turn, limit in enumerate((8, 5, 6)):
            message = await ask(MessageRequest(self.number, turn, list(self.ids), limit))
            self.messages.append(message)
            self.ids = [*self.ids, *message.ids, *[7] * turn]
            while self.number == 1 and not self.paused.is_set():
                await asyncio.sleep(0.01)


def test_a_message_goes_out_when_it_is_asked_for_with_a_seed_of_its_own(start, build, served, tokenizer):
    server, prompts, paused = start(), [Prompt(text=str(number), index=number) for number in range(2)], threading.Event()
    sampler, ids = build(server, weights=Weights(1)), [[3, 5], [4]]
    request = SamplingRequest(prompts, (), 2, PromptDraws(prompts, 2, 0))
    episodes = [Talks(number, ids[number // 2], paused) for number in range(4)]
    begun = sampler.play(ENGINE, tokenizer, request, episodes, 40)
    wait_until(lambda: [len(episode.messages) for episode in episodes] == [3, 1, 3, 3])
    assert not begun.done()
    sampler.update(Weights(2), served, keeps_requests=True)  # in the midst of the rollout
    paused.set()
    begun.result()
    assert [message.steps for message in episodes[1].messages] == [[1] * 3, [2] * 3, [2] * 3]
    assert {step for episode in episodes for message in episode.messages[:1] for step in message.steps} == {1}
    asked = [body for body in server.asked("/inference/v1/generate") if body]
    assert {body["sampling_params"]["n"] for body in asked} == {1}
    contexts = {(*body["token_ids"],): body["sampling_params"]["max_tokens"] for body in asked}
    assert contexts[4,] == 8 and contexts[3, 5, 10, 2, 1] == 5 and contexts[3, 5, 10, 2, 1, 12, 2, 1, 7] == 6
    seeds = [body["sampling_params"]["seed"] for body in asked]
    assert len(set(seeds)) == len(seeds) == 12
    sampler.version = None  # as after an update that failed
    with pytest.raises(RolloutError, match="no vLLM server has the policy's weights"):
        sampler.play(ENGINE, tokenizer, request, episodes, 40)


def test_requests_are_spread_evenly_a_prompt_in_one_and_a_slow_server_gets_fewer(start, build):
    servers = [start(delay=0.02), start(delay=0.02)]
    complete(build(*servers, weights=Weights(1)), prompts=8)
    assert shares(*servers) == [4, 4]
    assert {body["sampling_params"]["n"] for body in servers[0].asked("/inference/v1/generate") if body} == {4}
    slow, fast = start(delay=2), start(delay=0.01)
    complete(build(slow, fast, weights=Weights(1)), prompts=24)
    assert shares(slow)[0] <= 8


def test_requests_are_made_while_the_caller_continues_and_end_with_the_engine(start, build):
    server = start(delay=1)
    sampler = build(server, weights=Weights(1))
    begun = begin_rollout(sampler, [[3, 4], [5]])
    assert not begun.done()
    begun.wait()
    assert begun.done()
    assert len(begun.result().sequences) == 4 and begun.result() is begun.result()
    time.sleep(0.2)
    server.delay = 30
    begun = begin_rollout(sampler, [[3, 4], [5]])
    wait_until(lambda: len(server.running) == 2)
    assert 0.2 < sampler.take_idle_seconds() < 60
    sampler.shut_down()
    assert len(server.ended) == 2
    with pytest.raises(RolloutError, match="were ended"):
        begun.result()


def test_idle_times_of_servers_between_the_turns_of_a_rollout_add_up(start, build):
    sampler = build(start(), weights=Weights(1))
    for _ in range(3):
        complete(sampler, prompts=1)
        time.sleep(0.3)  # as an environment's step takes
    complete(sampler, prompts=1)
    assert 0.9 <= sampler.take_idle_seconds() < 60 and sampler.take_idle_seconds() == 0


def lines_of(caplog, text):
    return [line for line in caplog.messages if text in line]


def test_an_answer_of_a_server_that_hangs_is_reported_as_overdue_before_it_counts_as_lost(start, build, monkeypatch, caplog):
    monkeypatch.setattr(server_client, "_OVERDUE_S", 0.3)
    monkeypatch.setattr(dispatch, "_QUIET_S", 0.1)
    caplog.set_level("INFO", "lightning.pytorch")
    server, other = start(delay=0.2), start(delay=0.2)
    sampler, took = build(server, other, weights=Weights(1), give_up_after=90), server.on_inference_v1_generate

    def stops(body):
        server.hangs = True
        return took(body)

    def continues():
        wait_until(lambda: lines_of(caplog, "is overdue"))
        server.hangs = False

    server.on_inference_v1_generate = stops
    continuing = threading.Thread(target=continues)
    continuing.start()
    complete(sampler, prompts=4)
    continuing.join()
    assert all(server.url in line and "is waited for" in line for line in lines_of(caplog, "is overdue"))
    assert lines_of(caplog, "is overdue") and not lines_of(caplog, "no server answers")


def test_a_server_that_works_is_not_called_lost_for_one_failed_request_or_a_slow_answer(start, build, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    busy, late = start(delay=2), [True]
    sampler, answer = build(busy, weights=Weights(1), give_up_after=60), busy.on_inference_v1_generate

    def fails_once_late(body):
        if body and late:
            late.clear()
            busy.stopped.wait(1.3)
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        return answer(body)

    busy.on_inference_v1_generate = fails_once_late
    complete(sampler, prompts=2)
    assert shares(busy) == [3] and not lines_of(caplog, "no server answers")
    slow, dead, label = start(), start(), PLAIN["weight_info"]
    sampler = build(slow, dead, weights=Weights(1), give_up_after=60)
    dead.stop()
    slow.on_weight_info = lambda body: (slow.stopped.wait(1.5), label(slow, body))[1]
    complete(sampler, prompts=2)
    assert not lines_of(caplog, "no server answers")


@pytest.mark.parametrize(("nccl", "dies"), [(False, False), (True, True)], indirect=["nccl"])
def test_requests_go_on_over_an_update_and_each_token_says_which_weights_made_it(start, build, served, nccl, dies):
    servers = [start(delay=0.5), start(delay=0.5)]
    sampler, ids = build(*servers, weights=Weights(1), timeout=600), [[3, 4 + number] for number in range(4)]
    begun = begin_rollout(sampler, ids)
    wait_until(lambda: sum(shares(*servers)) == 4)
    servers[0].fails_updates = int(dies)
    with pytest.warns(UserWarning, match="is left out") if dies else contextlib.nullcontext():
        sampler.update(Weights(2), served, keeps_requests=True)
    began, rollouts = time.monotonic(), begun.result()
    assert time.monotonic() - began < 60, "nothing waits for the request to the other server"
    assert [row[0] for row in rollouts.sequences.completion_ids.tolist()] == [2 + sum(row) % 11 for row in ids for _ in range(2)]
    steps = sorted(rollouts.sequences.weights_step.tolist())
    assert steps == [[1, 2, 2]] * (4 if dies else 8) + [[2, 2, 2]] * (4 if dies else 0), "rows of the other server begin again"
    assert {body["mode"] for server in servers for body in server.asked("/pause")} == {"abort", "keep"}
    assert begin_rollout(sampler, ids, seed=1).result().sequences.weights_step.unique().tolist() == [2]


def after(seconds, action):
    threading.Timer(seconds, action).start()


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


# Parts of a completion that make it one that cannot be read.
GARBAGE = [
    {"token_ids": None},
    {"token_ids": ["a", "b", "c"]},
    {"token_ids": [3] * 9},  # more than were asked for
    {"logprobs": {"content": [{"logprob": float("nan")}] * 3}},
    {"weight_versions": [{"version": "1-1abc", "start": 1}]},
    {"weight_versions": [{"version": "x", "start": 0}]},
]


def test_answers_that_cannot_be_read_are_asked_for_elsewhere_and_end_the_rollout_where_there_are_no_others(start, build):
    odd, other = start(delay=0.01), start(delay=0.03)
    answer, sampler = odd.on_inference_v1_generate, build(odd, other, weights=Weights(1), give_up_after=60)

    def broken(body, parts):
        first, *others = answer(body)[1]["choices"]
        return 200, {"choices": [{**first, **parts}, *others] if parts else others}

    for parts in [*GARBAGE, {}]:
        odd.on_inference_v1_generate = lambda body, parts=parts: broken(body, parts)
        before = shares(odd)[0]
        complete(sampler, prompts=4)
        assert shares(odd)[0] > before, parts
    other.stop()
    sampler._outage.limit = 0.6
    odd.on_inference_v1_generate = lambda body: (200, {"choices": 3})
    with pytest.raises(RolloutError, match=r"cannot be read \(TypeError"):
        complete(sampler)
    odd.on_inference_v1_generate = lambda body: broken(body, {"token_ids": [2, 10**6, 1]})
    with pytest.raises(RolloutError, match="returned token 1000000, the policy has"):
        begin_rollout(sampler, [[3, 5]]).result()


def test_what_a_server_fails_at_is_tried_again_and_what_it_hangs_at_or_dies_with_goes_to_the_others(start, build):
    server = start(fails=3)
    complete(build(server, weights=Weights(1)), prompts=4)
    assert shares(server) == [7]
    hanging, other = start(), start()
    sampler = build(hanging, other, weights=Weights(1), timeout=3)
    held = hanging.on_inference_v1_generate
    hanging.on_inference_v1_generate = lambda body: held(body) if not body else (hanging.stopped.wait(60), held(body))[1]
    complete(sampler, prompts=6)
    assert hanging.ended
    dying, other = start(delay=0.1), start(delay=0.1)
    sampler = build(dying, other, weights=Weights(1))
    after(0.15, dying.stop)
    complete(sampler, prompts=16)
    assert shares(other)[0] > 8


def test_a_server_with_other_weights_is_left_out_until_it_has_been_updated_and_refused_where_there_are_no_others(
    start, build, served
):
    restarted, other = start(delay=0.1), start(delay=0.1)
    sampler = build(restarted, other, weights=Weights(1))
    after(0.15, restarted.restart)
    complete(sampler, prompts=16)
    restarted.requests.clear()
    complete(sampler, prompts=4)
    assert shares(restarted) == [0]
    sampler.update(Weights(2), served)
    complete(sampler, prompts=4)
    assert shares(restarted) == [2]
    for server in (restarted, other):
        after(0.15, partial(setattr, server, "label", "another run's"))
    for says in ("another run's", r"another run's instead of 2-2abc.*give each run its own servers"):
        with pytest.raises(RolloutError, match=says):
            complete(sampler)


def test_what_a_server_refuses_is_not_tried_elsewhere_and_what_it_would_refuse_not_asked(start, build):
    server, other = start(), start(delay=0.1)
    sampler = build(server, other, weights=Weights(1))
    server.sequences = 2  # fewer than it said
    with pytest.raises(RolloutError, match="max_num_seqs"):
        complete(sampler)
    sampler = build(start(sequences=2), weights=Weights(1))
    with pytest.raises(ConfigError, match="--max-num-seqs 4"):
        complete(sampler)

"""`VLLMServerSampler` against fake servers: what is refused before a run, where requests go, and what becomes of faults."""

import copy
import pickle
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny_models import build_model
from transformers import AutoTokenizer
from vllm_fake_server import FakeServer

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import ServedModel, WeightsVersion
from hybrid_lightning.types import Prompt

MODEL = build_model("llama")
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


class Weight:
    def __init__(self, name, value):
        self.name, self.value, self.shape = name, value, value.shape

    def write_rows(self, destination, first):
        destination.copy_(self.value[first : first + len(destination)])


class Weights:
    """Weights of a policy; training changes the attention of the second layer."""

    def __init__(self, step, base="base", sender=True, values=None):
        self.version, self.base, self.is_sender = WeightsVersion(step, f"{step}abc"), base, sender
        generator = torch.Generator().manual_seed(step)
        names = [f"layers.{layer}.self_attn.{part}.weight" for layer in range(2) for part in PROJECTIONS] + ["norm.weight"]
        self.values = values or {name: torch.randn(8, 4, generator=generator) for name in names}
        self.passes = []  # over the weights: how many came in each

    def _chosen(self, everything):
        return {name: value for name, value in self.values.items() if everything or "layers.1" in name}

    def shapes(self, everything):
        return {name: tuple(value.shape) for name, value in self._chosen(everything).items()}

    def stream(self, everything):
        self.passes.append(0)
        for name, value in self._chosen(everything).items():
            self.passes[-1] += 1
            yield Weight(name, value)


@pytest.fixture
def served(tokenizer):
    return ServedModel(MODEL.config, tokenizer, None, torch.float32, torch.device("cpu"))


@pytest.fixture
def start(tokenizer):
    started = []

    def make(**attributes):
        server = FakeServer(tokenizer, MODEL.config)
        for name, value in attributes.items():
            setattr(server, name, value)
        started.append(server)
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def build(served):
    made = []

    def build_for(*servers, weights=None, **arguments):
        arguments = {"timeout": 10, "give_up_after": 5, "max_new_tokens": 8} | arguments
        sampler = VLLMServerSampler(urls=[server.url for server in servers], **arguments)
        made.append(sampler)
        if weights is not None:
            sampler.update(weights, served)
        return sampler

    yield build_for
    for sampler in made:
        sampler.shut_down()


def complete(sampler, prompts=12, samples=4, on_token=None):
    """Complete prompts, and make sure that each has its own answers, in order."""
    ids = [[3, 4 + number] for number in range(prompts)]
    asked = [sampler._parameters([1], samples, number, False) for number in range(prompts)]
    answers = sampler.complete(ids, asked, on_token)
    assert [[list(answer.tokens) for answer in group] for group in answers] == [
        [[2 + sum(prompt) % 11, 2 + number, 1] for number in range(samples)] for prompt in ids
    ]
    return answers


def shares(*servers):
    """How many requests for completions each got; the check asks for the page itself, without a body."""
    return [len([body for body in server.asked("/inference/v1/generate") if body]) for server in servers]


# ---- before a run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"urls": []}, "at least one"),
        ({"urls": "http://a:1"}, "must be a list"),
        ({"urls": ["a:1"]}, "http://node7:8000"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "twice"),
        ({"urls": ["http://a:1"], "timeout": 0}, "timeout must be positive"),
    ],
)
def test_impossible_arguments_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        VLLMServerSampler(**arguments)


def test_copies_have_the_arguments_and_no_connections(start, build):
    sampler = build(start(), weights=Weights(1))
    for made in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert made.to_config() == sampler.to_config() and made.version is None and not made._transfers


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"version": "0.11.2"}, "has vLLM 0.11.2"),
        ({"missing": {"/version"}}, "no vLLM server"),
        ({"missing": {"/weight_info"}}, "VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/inference/v1/generate"}}, "--enable-scale-out"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"backend": None}, "--weight-transfer-config"),
        ({"backend": "ipc"}, '"hybrid_lightning" on CPUs'),
        ({"backend": "nccl"}, "policy on cpu"),
        ({"context": 8}, "--max-model-len"),
        ({"key": "secret"}, "VLLM_API_KEY"),
        ({"hangs": True}, "hangs"),
        ({"tokenizer": AutoTokenizer.from_pretrained(embedded_policy_path())}, "another tokenizer"),
        ({"config": build_model("gemma").config}, "has served.*model_type is 'gemma' there and 'llama' in the policy's"),
    ],
)
def test_what_a_server_lacks_is_said_before_the_run(start, build, served, fault, says):
    with pytest.raises((ConfigError, RolloutError), match=says) as raised:
        build(start(), start(**fault), timeout=1 if "hangs" in fault else 10).check_model(served)
    assert "\n" not in str(raised.value) and "http://127.0.0.1" in str(raised.value)


def test_a_server_that_is_not_there_is_refused_at_once(start, build, served):
    gone = start()
    gone.stop()
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"nothing answers there.*take it out of sampler.urls"):
        build(start(), gone).check_model(served)
    assert time.monotonic() - began < 3


def test_servers_that_take_weights_in_different_ways_are_refused_and_another_dtype_is_warned_of(start, build, served):
    with pytest.raises(ConfigError, match="different ways"):
        build(start(), start(backend="nccl")).check_model(replace(served, device=torch.device("cuda")))
    with pytest.warns(UserWarning, match="--dtype float32"):
        build(start(dtype="torch.bfloat16")).check_model(served)


def test_an_api_key_is_sent(start, build, served, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sampler = build(start(key="secret"), weights=Weights(1))
    sampler.check_model(served)
    complete(sampler, prompts=2)


def test_prompts_beyond_the_shortest_context_are_refused(start, build, served):
    sampler = build(start(), start(context=20))
    sampler.check_model(served)
    sampler.check_prompt(served.config, 12)
    with pytest.raises(ConfigError, match="context of 20 tokens"):
        sampler.check_prompt(served.config, 13)


def test_more_completions_of_a_prompt_than_a_server_makes_at_once_are_refused(start, build):
    sampler = build(start(sequences=2), weights=Weights(1))
    with pytest.raises(ConfigError, match="--max-num-seqs 4"):
        complete(sampler)


# ---- completions


def test_a_rollout_is_what_the_servers_answer(start, build, tokenizer):
    sampler = build(start(), start(), weights=Weights(3))
    prompts = [Prompt(text=str(number), index=number) for number in range(3)]
    engine = type("OfModel", (), {"model": MODEL})()
    rollouts = sampler.sample(engine, tokenizer, prompts, [[3, 5], [4], [6, 7, 8]], 2, generator=PromptDraws(prompts, 2, 0))
    tokens = rollouts.sequences.completion_ids
    assert tokens.tolist() == [[10, 2, 1], [10, 3, 1], [6, 2, 1], [6, 3, 1], [12, 2, 1], [12, 3, 1]]
    torch.testing.assert_close(rollouts.sampling_logprobs, tokens * -0.5)
    assert rollouts.finished.all()


def test_requests_are_spread_evenly_with_all_completions_of_a_prompt_in_one(start, build):
    servers = [start(delay=0.02), start(delay=0.02)]
    complete(build(*servers, weights=Weights(1)), prompts=8)
    assert shares(*servers) == [4, 4]
    assert {body["sampling_params"]["n"] for body in servers[0].asked("/inference/v1/generate") if body} == {4}


def test_a_slow_server_gets_fewer(start, build):
    slow, fast = start(delay=0.5), start(delay=0.01)
    began = time.monotonic()
    complete(build(slow, fast, weights=Weights(1)), prompts=24)
    assert time.monotonic() - began < 1.5 and shares(slow)[0] <= 8


def after(seconds, action):
    threading.Timer(seconds, action).start()


def test_what_a_server_that_dies_has_not_answered_goes_to_the_others(start, build):
    dying, other = start(delay=0.2), start(delay=0.2)
    sampler = build(dying, other, weights=Weights(1))
    after(0.3, dying.stop)
    complete(sampler, prompts=16)
    assert shares(other)[0] > 8


def test_a_server_that_answers_500_is_tried_again(start, build):
    server = start(fails=3)
    complete(build(server, weights=Weights(1)), prompts=4)
    assert shares(server) == [7]


def test_requests_of_a_server_that_hangs_go_to_the_others_and_are_ended(start, build):
    hanging, other = start(), start()
    sampler = build(hanging, other, weights=Weights(1), timeout=1)
    held = hanging.on_inference_v1_generate
    hanging.on_inference_v1_generate = lambda body: held(body) if not body else (hanging.stopped.wait(3), held(body))[1]
    complete(sampler, prompts=6)
    assert hanging.ended


def test_a_server_that_was_restarted_is_left_out_until_it_has_been_updated(start, build, served):
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


def test_without_any_server_the_rollout_ends_within_the_limit(start, build):
    server = start(delay=0.2)
    sampler = build(server, weights=Weights(1), give_up_after=1)
    after(0.1, server.stop)
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"no vLLM server completes.*127.0.0.1.*stopped.ckpt") as raised:
        complete(sampler)
    assert time.monotonic() - began < 4 and "\n" not in str(raised.value)


def test_a_server_that_comes_back_in_time_completes_what_is_left(start, build):
    server = start(delay=0.2)
    sampler = build(server, weights=Weights(1))
    label = server.label

    def again():
        server.start()
        server.label = label

    after(0.1, server.stop)
    after(0.8, again)
    assert len(complete(sampler, prompts=4)) == 4  # each with its own answers, as `complete` makes sure


def test_weights_that_another_run_has_set_are_refused_also_in_the_middle(start, build):
    server = start(delay=0.2)
    sampler = build(server, weights=Weights(1))
    after(0.3, lambda: setattr(server, "label", "another run's"))
    for says in ("another run's", r"another run's instead of 1-1abc.*servers of its own"):
        with pytest.raises(RolloutError, match=says):
            complete(sampler)


def test_what_a_server_refuses_is_not_tried_elsewhere(start, build):
    server, other = start(), start(delay=0.1)
    sampler = build(server, other, weights=Weights(1))
    server.sequences = 2  # fewer than it said
    with pytest.raises(RolloutError, match="max_num_seqs"):
        complete(sampler)


def test_a_signal_ends_the_requests_on_the_servers(start, build):
    server = start(delay=30)
    sampler = build(server, weights=Weights(1))

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGUSR2, stop)
    try:
        after(0.4, lambda: signal.raise_signal(signal.SIGUSR2))
        began = time.monotonic()
        with pytest.raises(SystemExit):
            complete(sampler)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert time.monotonic() - began < 3
    assert len(server.ended) == 4, "all that it had: twice its sequences over the completions of a prompt"


def test_progress_is_told_and_may_end_the_sampling(start, build):
    server = start(delay=0.25)
    sampler = build(server, weights=Weights(1))
    told = []
    complete(sampler, on_token=lambda running, decoded: told.append((running, decoded)))
    assert told[-1] == (0, 8) and told == sorted(told, reverse=True, key=lambda pair: pair[0]) and len(told) > 2

    def refuse(running, decoded):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(sampler, on_token=refuse)


# ---- weights


def test_all_weights_come_first_and_then_what_has_changed(start, build, served):
    servers = [start(), start()]
    first, second = Weights(1), Weights(2)
    sampler = build(*servers)
    assert sampler.needs_everything(first, served)
    sampler.update(first, served, True)
    assert not sampler.needs_everything(second, served)
    sampler.update(second, served, False)
    for server in servers:
        assert [len(names) for names in server.updates] == [7, 3] and server.label == "2-2abc" and not server.paused
        for name, value in (first.values | {name: second.values[name] for name in server.updates[1]}).items():
            assert torch.equal(server.weights[name], value)
        order = [path for path, _ in server.requests]
        assert order.index("/pause") < order.index("/update_weight_version") < order.index("/start_weight_update")
        assert server.asked("/update_weight_version")[0] == {"new_version": "updating"}
        assert order.count("/init_weight_transfer_engine") == 2, "once to compare the model, once to connect"
        assert [path for path in order if path in ("/finish_weight_update", "/reset_prefix_cache", "/resume")] == [
            "/finish_weight_update", "/reset_prefix_cache", "/resume",
        ] * 2  # fmt: skip
    assert first.passes == [7] and second.passes == [3], "one pass for both servers"


def test_an_unchanged_version_is_sent_to_what_was_restarted_alone(start, build, served):
    server, other = start(active=True), start()  # of the one an update by another sender was left open
    sampler = build(server, other, weights=Weights(1))
    assert server.label == "1-1abc" and not server.active
    server.requests.clear()
    sampler.update(Weights(1), served)
    assert [path for path, _ in server.requests] == ["/weight_info"]
    server.restart()
    sampler.update(Weights(1), served)
    assert len(server.updates) == 1 and len(other.updates) == 1 and server.label == "1-1abc"


@pytest.mark.parametrize("what", ["restarted", "another run", "another base"])
def test_what_is_not_what_was_sent_last_gets_everything(start, build, served, what):
    server, other = start(), start()
    sampler = build(server, other, weights=Weights(1))
    if what == "restarted":
        server.restart()
    elif what == "another run":
        server.label = "7-another"
    weights = Weights(2, base="another" if what == "another base" else "base")
    assert sampler.needs_everything(weights, served)
    sampler.update(weights, served, True)
    assert len(server.updates[-1]) == len(other.updates[-1]) == 7 and server.label == other.label == "2-2abc"


def test_ranks_that_do_not_send_make_as_many_passes(start, build, served):
    server = start()
    sampler = build(server)
    mine = Weights(1, sender=False)
    sampler.update(mine, served, True)
    sampler.update(mine, served, False)
    assert mine.passes == [7] and sampler.version == mine.version and not server.requests


def test_a_server_that_fails_in_an_update_is_left_out_until_the_next(start, build, served):
    failing, other = start(), start()
    sampler = build(failing, other, weights=Weights(1))
    failing.fails_updates = 1
    weights = Weights(2)
    with pytest.warns(UserWarning, match=r"is left out.*out of memory"):
        sampler.update(weights, served, False)
    assert weights.passes == [3], "to the end, for the other ranks"
    assert failing.label == "updating" and other.label == "2-2abc"
    failing.requests.clear()
    complete(sampler, prompts=4)
    assert shares(failing) == [0]
    sampler.update(Weights(3), served)
    assert failing.label == other.label == "3-3abc" and len(failing.weights) == 7


def test_a_server_that_dies_in_an_update_is_left_out(start, build, served):
    dying, other = start(), start()
    sampler = build(dying, other, weights=Weights(1))
    dying.on_start_weight_update = lambda body: dying.stop()
    with pytest.warns(UserWarning, match="is left out"):
        sampler.update(Weights(2), served, False)
    assert other.label == "2-2abc"


def test_a_failed_update_of_the_only_server_is_made_again_with_everything_unless_other_ranks_take_part(start, build, served):
    server = start()
    sampler = build(server, weights=Weights(1))
    server.fails_updates = 1
    with pytest.warns(UserWarning, match="out of memory"):
        sampler.update(Weights(2), served)
    assert server.label == "2-2abc" and len(server.updates[-1]) == 7
    server.fails_updates, weights = 1, Weights(3)
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(RolloutError, match="no vLLM server took"):
        sampler.update(weights, served, False)
    assert weights.passes == [3]
    assert sampler.needs_everything(weights, served), "so that ranks that have drained them take part again"


def test_no_server_to_update_ends_within_the_limit(start, build, served):
    server = start()
    sampler = build(server, weights=Weights(1), give_up_after=1)
    server.stop()
    began = time.monotonic()
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(RolloutError, match=r"no vLLM server takes.*nothing answers.*stopped.ckpt"),
    ):
        sampler.needs_everything(Weights(2), served)
    weights = Weights(2)
    with pytest.raises(RolloutError, match="no vLLM server takes"):
        sampler.update(weights, served, False)
    assert weights.passes == [3] and time.monotonic() - began < 5


def test_a_server_that_comes_back_as_another_model_is_left_out(start, build, served):
    server, other = start(), start()
    sampler = build(server, other, weights=Weights(1))
    server.config = copy.deepcopy(served.config)
    server.config.hidden_size = 5
    server.restart()
    with pytest.warns(UserWarning, match=r"is left out.*hidden_size is 5 there"):
        sampler.update(Weights(2), served)
    assert other.label == "2-2abc" and not sampler.needs_everything(Weights(3), served), (
        "it is not counted with until it is started anew"
    )


def test_servers_can_be_used_by_the_next_run(start, build, served):
    server = start()
    sampler = build(server, weights=Weights(1))
    sampler.shut_down()
    assert server.asked("/shutdown_weight_transfer_engine") and server.group is None
    complete(build(server, weights=Weights(5)), prompts=2)

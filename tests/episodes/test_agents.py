"""Agents of the user's: their conversations as rows of tokens, their faults, their endpoint; with a tiny policy."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import agents_of_tests as agents
import httpx
import pytest
import torch
from test_calibration import calibrate, mean_gradient
from tiny_models import build_model, plain_logprobs, tokens_of
from tiny_runs import OftenDone, build_policy, fit, trained

from hybrid_lightning.agents import CommandAgent, FunctionAgent, endpoint
from hybrid_lightning.agents.endpoint import Endpoint
from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.environments import Environment, EpisodeLimits, Step
from hybrid_lightning.episodes.agent_episode import AgentEpisode
from hybrid_lightning.episodes.episodes import episode_metrics, episode_records, has_failed
from hybrid_lightning.errors import ConfigError, EpisodeError, RolloutError
from hybrid_lightning.losses import DAPOLoss, GRPOLoss, TokenTruncation
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.training import SelfTeacher
from hybrid_lightning.types import Prompt

pytest.importorskip("starlette")
pytest.importorskip("openai")
PROMPTS = [Prompt(text="3+4=", index=0, columns={"index": 0}), Prompt(text="12*3=", index=1, columns={"index": 1})]
PROGRAM = [sys.executable, str(Path(__file__).with_name("agents_of_tests.py"))]


class Talk(Environment):
    """The conversation of `agents.talk` as an environment."""

    said = 0

    def start(self, prompt, seed):
        self.prompt = prompt
        return [{"role": "user", "content": "go"}]

    def step(self, message):
        self.said += 1
        text = message["content"]
        return Step([{"role": "user", "content": f"n{len(text)}"}], reward=len(text) / 100, over=self.said == 3)

    def final_reward(self):
        return float(self.prompt.columns["index"])


@pytest.fixture
def play(model):
    policies = []

    def run(agent, *, samples=3, prompts=PROMPTS, environment=None, max_new_tokens=5, greedy=False, kind=OftenDone, **limits):
        options = {"environment": environment} if environment else {"agent": agent}
        policy = build_policy(
            model,
            reward=None,
            turn_template="{content}",
            sampler=kind(max_new_tokens),
            episodes=EpisodeLimits(**{"max_tokens": 60, "max_failed_share": 1.0, **limits}),
            **options,
        )
        policies.append(policy)
        return policy, policy.generate(prompts, samples, None if greedy else PromptDraws(prompts, samples, 5), greedy)

    yield run
    for policy in policies:
        policy.task.generation.shut_down()


def same(one, other):
    for name, value in vars(one.sequences).items():
        assert torch.equal(getattr(other.sequences, name), value), name
    assert torch.equal(one.sampling_logprobs, other.sampling_logprobs)
    assert [c.episode.rewards[-1] for c in one.completions] == [c.episode.rewards[-1] for c in other.completions]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_linear_conversation_is_that_of_an_environment_to_the_bit(play, greedy):
    _, one = play(None, environment=Talk(), samples=1 if greedy else 3, greedy=greedy)
    _, other = play(agents.talk, samples=1 if greedy else 3, greedy=greedy)
    for name, value in vars(one.sequences).items():
        assert torch.equal(getattr(other.sequences, name), value), name
    assert torch.equal(one.sampling_logprobs, other.sampling_logprobs)
    assert [str(c) for c in one.completions] == [str(c) for c in other.completions]
    assert {c.episode.end for c in other.completions} <= {"answered", "tokens"}
    paid = [[sum(c.episode.rewards) for c in rollout.completions] for rollout in (one, other)]
    assert paid[0] == pytest.approx(paid[1])


def test_a_coroutine_a_function_in_a_thread_and_a_command_get_the_same_bits_however_many_run_at_once(play):
    _, one = play(agents.talk)
    _, thread = play(agents.talk_in_thread)
    _, command = play(CommandAgent([*PROGRAM, "talk"]))
    same(one, thread)
    same(one, command)
    assert command.completions[3].episode.counts["parts/index"] == 1
    few = [play(FunctionAgent(agents.talk, concurrency=2))[1] for _ in range(2)]
    same(*few)
    assert torch.equal(few[0].sequences.completion_ids, one.sequences.completion_ids)
    torch.testing.assert_close(few[0].sampling_logprobs, one.sampling_logprobs)


def test_a_rewritten_history_and_requests_side_by_side_are_rows_with_the_probabilities_of_their_own_tokens(play):
    policy, rollout = play(agents.rewrites, max_tokens=40)
    assert torch.bincount(rollout.episode_of_row).tolist() == [4] * 6
    again = play(agents.rewrites, max_tokens=40)[1]
    same(rollout, again)
    metrics = episode_metrics(rollout.completions)
    assert (metrics["episodes/rows"], metrics["episodes/forks"], metrics["episodes/turns"]) == (4, 3, 5)
    assert metrics["episodes/trained_share"] == 1
    records = episode_records(policy.task.generation.score(rollout))
    assert all(len(record["more_rows"]) == 3 and record["counts"]["rows"] == 4 for record in records)
    assert records[0]["more_rows"][2]["completion_ids"] == tokens_of(rollout.sequences, 3)[1]
    texts = set()
    for row in range(len(rollout.sequences)):
        _, ids = tokens_of(rollout.sequences, row)
        sampled = rollout.sequences.sampled_mask[row, : len(ids)]
        true = plain_logprobs(policy.model, rollout.sequences, row)
        expected = torch.where(sampled, true, 0.0)
        torch.testing.assert_close(rollout.sampling_logprobs[row, : len(ids)], expected, atol=1e-5, rtol=1e-5)
        texts.add((int(rollout.episode_of_row[row]), tuple(ids)))
    assert len(texts) > 18, "requests side by side have their own random numbers"
    for number, completion in enumerate(rollout.completions):
        own = rollout.sequences.sampled_mask[rollout.episode_of_row == number].sum()
        assert completion.num_tokens == own == sum(completion.episode.lengths)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("raises", "raised ValueError: the board is gone (agents_of_tests.py line"),
        ("hangs", "took longer than agent.timeout_s=0.5 s"),
        ("hangs_in_thread", "took longer than agent.timeout_s=0.5 s"),
        ("says_nan", "returned reward=nan; it must be finite"),
        ("says_text", "returned reward='good'; it must be a number"),
        ("says_nothing", "returned no number, and there is no model.reward"),
        ("never_asks", "got no message of the policy"),
        ("swallows", "goes on after 16 requests were refused"),
        ("killed", "was killed by signal 9"),
        ("fails", "ended with status 1: 'no such board'"),
        ("mumbles", "wrote 'well' as its last line"),
    ],
)
def test_a_fault_is_named_and_counted_and_never_a_reward_of_0(play, caplog, name, cause):
    function = getattr(agents, name, None)
    timed = {"timeout_s": 0.5 if "hangs" in name else 20.0}
    agent = FunctionAgent(function, **timed) if function else CommandAgent([*PROGRAM, name], **timed)
    _, rollout = play(agent, samples=2, prompts=PROMPTS[:1])
    assert all(map(has_failed, rollout.completions)) and not rollout.sequences.sampled_mask.any()
    assert caplog.text.count(cause) == 1, "once for all"
    with pytest.raises(EpisodeError, match="the agent failed in 1 of 2 episodes, more than"):
        play(agent, samples=2, prompts=PROMPTS[:1], max_failed_share=0.1)


def test_a_run_whose_first_agents_all_fail_stops_whatever_share_may(play):
    with pytest.raises(EpisodeError, match=r"failed in 8 of 10 episodes, the first ones: .* the board is gone"):
        play(agents.raises, samples=5)


def test_an_agent_that_asks_on_is_ended_by_the_limits_and_one_that_gives_up_goes_on(play):
    _, rollout = play(agents.asks_on, max_turns=3)
    assert {c.episode.end for c in rollout.completions} == {"turns"}
    assert {(c.episode.turns, sum(c.episode.rewards)) for c in rollout.completions} == {(3, 0.0)}
    _, rollout = play(agents.gives_up)
    assert {c.episode.turns for c in rollout.completions} == {1}
    assert min(c.episode.rewards[-1] for c in rollout.completions) >= 1


def test_a_command_that_forks_leaves_no_process_behind(play):
    _, rollout = play(CommandAgent([*PROGRAM, "forks"]), samples=1)
    assert [c.episode.rewards for c in rollout.completions] == [(1.0,)] * 2
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"{PROGRAM[1]} forks" not in running


def test_an_agent_that_blocks_the_event_loop_is_named(play, monkeypatch):
    monkeypatch.setattr("hybrid_lightning.episodes.episodes.BLOCKED_S", 0.5)

    async def blocks(row, client):
        await client.chat.completions.create(**agents.ASKED)
        time.sleep(2.0)

    with pytest.raises(RolloutError, match=r"the agent blocks has blocked the event loop .* make the function an ordinary one"):
        play(FunctionAgent(blocks, timeout_s=0.5))
    play(agents.talk)  # on another event loop


def test_what_is_wrong_with_a_request_is_said_in_openais_form(play):
    found = {}

    def asks(row, client):
        post, asked = partial(agents.post, row), agents.ASKED
        messages = asked["messages"]
        found.update(
            unknown=post(asked, key="mine"),
            garbage=post(b"\xff{"),
            list=post(b"[]"),
            deep=post(b'{"messages":' + b"[" * 100_000),
            large=post(b"x" * (17 * 2**20)),
            several=post({**asked, "n": 2}),
            image=post({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}),
            none=post({"messages": []}),
            path=post(asked, "/embeddings"),
            stop=post({**asked, "stop": [""]}),
            long=post({"messages": [{"role": "user", "content": "1" * 500}]}),
            huge=post({"messages": [{"role": "user", "content": "1" * (15 * 2**20)}]}),
            good=post({**asked, "temperature": 0.1, "tool_choice": "required", "logprobs": True, "max_tokens": 2}),
        )
        found["row"], found["models"] = row, httpx.get(f"{row['base_url']}/models", headers={"X-Api-Key": row["api_key"]})
        assert messages
        return 1.0

    _, rollout = play(asks, samples=1, prompts=PROMPTS[:1])
    said = {name: (answer.status_code, answer.json()) for name, answer in found.items() if name != "row"}
    codes = {"unknown": 401, "large": 413, "path": 404, "good": 200, "models": 200}
    assert {name: code for name, (code, _) in said.items()} == {name: codes.get(name, 400) for name in said}
    for name, (code, body) in said.items():
        assert code == 200 or (body["error"]["message"] and body["error"]["type"] == "invalid_request_error"), name
    assert {said[name][1]["error"]["code"] for name in ("long", "huge")} == {"context_length_exceeded"}
    assert rollout.completions[0].episode.end == "tokens"
    choice = said["good"][1]["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert said["good"][1]["usage"]["completion_tokens"] == len(tokens) <= 2
    assert [token["logprob"] for token in tokens] == pytest.approx(rollout.sampling_logprobs[0, : len(tokens)].tolist())
    ended = agents.post(found["row"], agents.ASKED)
    assert (ended.status_code, ended.json()["error"]["code"]) == (410, "episode_ended")


def test_a_text_that_ends_one_request_ends_no_other(play):
    async def asks(row, client):
        stop = {"stop": ends} if row["index"] else {}
        answer = await client.chat.completions.create(**agents.ASKED, **stop)
        found[row["index"]].append(answer.choices[0].message.content)
        return 1.0

    found, ends = {0: [], 1: []}, list("aeiou05rg=")
    _, rollout = play(asks, samples=16, max_new_tokens=12, kind=Sampler)
    assert not any(set(text) & {*ends} for text in found[1]) and any(set(text) & {*ends} for text in found[0])
    assert [str(c) for c in rollout.completions[16:]] == found[1]
    more = [c.num_tokens - len(c) for c in rollout.completions[16:] if c.finished]
    assert more and set(more) == {1}, "the token that ended a message is one of its tokens"


def test_what_would_change_the_distribution_is_answered_and_said_once(play, caplog):
    async def asks(row, client):
        for _ in range(2):
            await client.chat.completions.create(**agents.ASKED, temperature=0.1, tool_choice="required")
        return 1.0

    play(asks)
    assert caplog.text.count("asks with temperature, which would change") == 1 and "set model.sampler.temperature" in caplog.text
    assert caplog.text.count("asks with tool_choice") == 1


def test_all_dialects_whole_and_as_streams_say_the_same(play):
    said = {}

    for kind, (path, body, read) in KINDS.items():

        def asks(row, client, kind=kind, path=path, body=body, read=read):
            answer = agents.post(row, body, path)
            assert answer.status_code == 200, answer.text
            said[kind] = read(answer)
            return 1.0

        _, rollout = play(asks, samples=1, prompts=PROMPTS[:1], max_new_tokens=12)
        assert said[kind] == str(rollout.completions[0])
    assert len(set(said.values())) == 1


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


KINDS = {
    "chat": (
        "/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "12"}]}]},
        lambda answer: answer.json()["choices"][0]["message"]["content"],
    ),
    "chat stream": (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "12"}], "stream": True},
        lambda answer: "".join(e["choices"][0]["delta"].get("content") or "" for e in events(answer)),
    ),
    "chat stream with usage": (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "12"}], "stream": True, "stream_options": {"include_usage": True}},
        lambda answer: (
            "".join(c["delta"].get("content") or "" for e in events(answer) for c in e["choices"])
            * (events(answer)[-1]["usage"]["prompt_tokens"] == 2)
        ),
    ),
    "responses": (
        "/responses",
        {"input": "12", "store": False},
        lambda answer: answer.json()["output"][0]["content"][0]["text"],
    ),
    "responses stream": (
        "/responses",
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "12"}]}], "stream": True},
        lambda answer: events(answer)[-1]["response"]["output"][0]["content"][0]["text"],
    ),
    "messages": (
        "/messages",
        {"messages": [{"role": "user", "content": "12"}], "max_tokens": 50},
        lambda answer: answer.json()["content"][0]["text"],
    ),
    "messages stream": (
        "/messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "12"}]}], "max_tokens": 50, "stream": True},
        lambda answer: "".join(e["delta"].get("text", "") for e in events(answer) if e["type"] == "content_block_delta"),
    ),
}


def test_settings_that_cannot_work_are_refused(model):
    with pytest.raises(ConfigError, match=r"agent.function=.*one parameter|agent.function=.*too many positional"):
        FunctionAgent(lambda row: 1.0)
    with pytest.raises(ConfigError, match=r"agent.concurrency=0; give a whole number"):
        FunctionAgent(agents.talk, concurrency=0)
    with pytest.raises(ConfigError, match=r"model.agent and model.environment are both set"):
        build_policy(model, agent=agents.talk, environment=Talk())
    with pytest.raises(ConfigError, match=r"there is no program 'no-such-program'"):
        CommandAgent("no-such-program --now").check()
    with pytest.raises(ConfigError, match=r"model.credit=turn needs an environment's rewards"):
        build_policy(model, agent=agents.talk, credit="turn")
    with pytest.raises(ConfigError, match=r"model.teacher.context changes the prompts"):
        build_policy(model, agent=agents.talk, teacher=SelfTeacher("{prompt} = {answer}"))


def test_what_is_not_installed_is_named_or_done_without(play, monkeypatch):
    seen = []

    def asks(row, client):
        seen.append(client)
        return agents.talk_in_thread(row, client)

    monkeypatch.setattr(endpoint, "find_spec", lambda name: None if name == "openai" else name)
    play(asks, samples=1)
    assert seen == [None, None]
    monkeypatch.setattr(endpoint, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs starlette and uvicorn; run pip install 'hybrid-lightning\[agents\]'"):
        play(asks)


def test_where_the_endpoint_listens_is_said_once_and_a_port_that_is_taken_is_refused(model, sums, tmp_path, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"agent.host='127.0.0.1' with port {port}: Address already in use"):
            Endpoint(FunctionAgent(agents.talk, port=port))
    with caplog.at_level("INFO", "lightning.pytorch"):
        for agent in (FunctionAgent(agents.talk, host="0.0.0.0", port=port), agents.talk_in_thread):
            fit(model, sums, tmp_path, policy=arguments(agent, minibatches_per_rollout=1), max_steps=1)
    lines = [line for line in caplog.messages if line.startswith("Agent talk")]
    assert lines[0] == (
        f"Agent talk: 256 at once, served at http://127.0.0.1:{port}/v1, open to whoever reaches 0.0.0.0 port {port} and has the "
        "key of an episode, without encryption; a run repeats itself to the bit if the agent does"
    )
    assert len(lines) == 2 and lines[1].endswith("if the agent does and waits for each message before it asks for another")


def arguments(agent, **options):
    limits = EpisodeLimits(max_tokens=40)
    common = {"reward": None, "turn_template": "{content}", "sampler": OftenDone(5), "minibatches_per_rollout": 2}
    return {**common, "agent": agent, "episodes": limits, **options}


STOPPED = {"rewrites": agents.rewrites, "talk": agents.talk, "command": CommandAgent([*PROGRAM, "talk"])}


@pytest.mark.parametrize(("name", "ahead"), [("rewrites", 0), ("talk", 1), ("command", 0)])
def test_a_run_that_is_stopped_within_an_agents_episode_resumes_to_the_same_bits(model, sums, tmp_path, monkeypatch, name, ahead):
    def run(folder, ckpt=None, at=0):
        began, complete = Counter[str](), AgentEpisode.complete

        async def counted(episode, asked):
            began["requests"] += 1
            if began["requests"] == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return await complete(episode, asked)

        policy = arguments(STOPPED[name], rollouts_ahead=ahead, correction=TokenTruncation() if ahead else None)
        flags = {"max_steps": 4, "enable_checkpointing": True, "ckpt": ckpt}
        with monkeypatch.context() as patch:
            patch.setattr(AgentEpisode, "complete", counted)
            try:
                return trained(fit(model, sums, folder, GracefulStop(), policy=policy, **flags)), began["requests"]
            except SystemExit:
                (stopped,) = folder.rglob("stopped.ckpt")
                return stopped, began["requests"]

    whole, requests = run(tmp_path / "whole")
    # In the second rollout, when some agents have answers and others wait for theirs.
    stopped, made = run(tmp_path / "stopped", at=3 * requests // 4)
    assert stopped.name == "stopped.ckpt" and made < requests
    resumed, _ = run(tmp_path / "resumed", stopped)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("loss", [GRPOLoss(), DAPOLoss()], ids=["by episode", "by token"])
def test_the_loss_of_an_episode_with_forks_is_that_of_one_sequence_whatever_its_rows(model, sums, loss):
    """By a loop in float64 over the rows: a mean over episodes of means over their tokens, or a mean over all tokens."""
    policy, rollouts, losses = calibrate(model, sums, **arguments(agents.rewrites, loss=loss, minibatches_per_rollout=1))
    base = build_model("llama", std=0.1).requires_grad_(True).double()
    sampled, episodes = rollouts.sequences.sampled_mask, rollouts.episode_of_row.tolist()
    rewards = torch.tensor([completion.episode.rewards[-1] for completion in rollouts.completions]).double().view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()
    total, tokens = torch.zeros((), dtype=torch.float64), Counter[int]()
    for row, episode in enumerate(episodes):
        tokens[episode] += int(sampled[row].sum())
    for row, episode in enumerate(episodes):
        logprobs = plain_logprobs(base, rollouts.sequences, row)
        own = logprobs[sampled[row, : len(logprobs)]].sum()
        weight = tokens[episode] * len(advantages) if isinstance(loss, GRPOLoss) else sum(tokens.values())
        total = total - advantages[episode] * own / weight
    assert len(episodes) == 4 * len(advantages) and any(advantages)
    expected = build_model("llama", std=0.1).requires_grad_(True)
    total.backward()
    for one, other in zip(expected.parameters(), base.parameters(), strict=True):
        one.grad = None if other.grad is None else other.grad.float()
    gradient = mean_gradient(policy, losses)
    scale = max(float(p.grad.abs().max()) for p in expected.parameters() if p.grad is not None)
    assert scale > 1e-3
    for name, p in expected.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradient[name], p.grad, atol=1e-5 * scale, rtol=1e-4, msg=name)

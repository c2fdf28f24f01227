"""Agents written with real packages, unchanged: each asks, calls a tool, and answers; two steps of training."""

import json
from collections import Counter

import pytest
from tiny_models import build_byte_tokenizer, build_model
from tiny_runs import Log, build_adapter, build_policy, build_trainer

from hybrid_lightning.adapters import Random
from hybrid_lightning.agents import FunctionAgent
from hybrid_lightning.data import FileSource, PlainFormat, PromptDataModule
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import Sampled
from hybrid_lightning.rollout.playing import NOTHING, RolloutFuture, Rounds
from hybrid_lightning.types import Completion

pytest.importorskip("starlette")
pytest.importorskip("openai")
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call a tool with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif -%}
{% for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


class Scripted(Sampler):
    """Calls `add` and then says the sum, in half of the episodes; else it answers at once."""

    def play(self, runner, tokenizer, request, episodes, capacity=None, around=NOTHING):
        messages, self.said = [], Counter()
        with Rounds(episodes, around) as rounds:
            while asked := rounds.advance(messages):
                messages = [self.say(tokenizer, each) for each in asked]
        return RolloutFuture.of(None)

    def say(self, tokenizer, asked):
        self.said[asked.episode] += 1
        text = "I say 5." if asked.episode % 2 else "It is 4."
        if not asked.episode % 2 and self.said[asked.episode] == 1:
            text = call("add", a=2, b=2)
        elif "final_answer" in tokenizer.decode(asked.ids):
            text = call("final_answer", answer=text)
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        return Sampled(ids, [-1.0] * len(ids), [], Completion(text, len(ids), True))


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": SCHEMA}}


def paid(answer):
    return float("4" in str(answer))


async def with_openai(row, client):
    messages = [{"role": "user", "content": row["prompt"]}]
    while True:
        answer = (await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])).choices[0].message
        messages.append(answer)
        if not answer.tool_calls:
            return paid(answer.content)
        for each in answer.tool_calls:
            result = str(add(**json.loads(each.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": each.id, "content": result})


async def with_openai_stream(row, client):
    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        async with client.chat.completions.stream(model="policy", messages=messages, tools=[TOOL]) as stream:
            answer = (await stream.get_final_completion()).choices[0].message
        if not answer.tool_calls:
            break
        messages += [answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "4"}]
    return paid(answer.content)


def openai_agents(model_of):
    async def solve(row, client):
        agents = pytest.importorskip("agents")
        agents.set_tracing_disabled(True)
        agent = agents.Agent(name="adder", tools=[agents.function_tool(add)], model=model_of(agents)("policy", client))
        return paid((await agents.Runner.run(agent, row["prompt"])).final_output)

    return solve


async def openai_agents_stream(row, client):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    model = agents.OpenAIResponsesModel("policy", client)
    streamed = agents.Runner.run_streamed(
        agents.Agent(name="adder", tools=[agents.function_tool(add)], model=model), row["prompt"]
    )
    async for _ in streamed.stream_events():
        pass
    return paid(streamed.final_output)


async def pydantic_ai(row, client):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("policy", provider=OpenAIProvider(openai_client=client)), tools=[add])
    return paid((await agent.run(row["prompt"])).output)


async def langgraph(row, client):
    pytest.importorskip("langgraph"), pytest.importorskip("langchain_openai")
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="policy", base_url=row["base_url"], api_key=row["api_key"])
    found = await create_react_agent(model, [add]).ainvoke({"messages": [("user", row["prompt"])]})
    return paid(found["messages"][-1].content)


def smolagents(row, client):
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel("policy", api_base=row["base_url"], api_key=row["api_key"])
    agent = smolagents.ToolCallingAgent(tools=[smolagents.tool(add)], model=model, max_steps=3, verbosity_level=0)
    return paid(agent.run(row["prompt"]))


async def litellm(row, client):
    litellm = pytest.importorskip("litellm")
    place = {"model": "openai/policy", "api_base": row["base_url"], "api_key": row["api_key"]}
    messages = [{"role": "user", "content": row["prompt"]}]
    answer = (await litellm.acompletion(messages=messages, tools=[TOOL], **place)).choices[0].message
    if answer.tool_calls:
        result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "4"}
        answer = (await litellm.acompletion(messages=[*messages, answer, result], tools=[TOOL], **place)).choices[0].message
    return paid(answer.content)


async def anthropic(row, client):
    anthropic = pytest.importorskip("anthropic")
    own = anthropic.AsyncAnthropic(base_url=row["base_url"].removesuffix("/v1"), api_key=row["api_key"])
    tools = [{"name": "add", "description": "Add two numbers.", "input_schema": SCHEMA}]
    messages = [{"role": "user", "content": row["prompt"]}]
    answer = await own.messages.create(model="policy", max_tokens=100, messages=messages, tools=tools)
    used = [block for block in answer.content if block.type == "tool_use"]
    if used:
        results = [{"type": "tool_result", "tool_use_id": block.id, "content": str(add(**block.input))} for block in used]
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        answer = await own.messages.create(model="policy", max_tokens=100, messages=messages, tools=tools)
    return paid(answer.content[0].text)


# Function, rows of an episode with a call, and requests of it.
AGENTS = {
    "openai": (with_openai, 1, 2),
    "openai stream": (with_openai_stream, 1, 2),
    "openai-agents": (openai_agents(lambda agents: agents.OpenAIResponsesModel), 1, 2),
    "openai-agents chat": (openai_agents(lambda agents: agents.OpenAIChatCompletionsModel), 1, 2),
    "openai-agents stream": (openai_agents_stream, 1, 2),
    "pydantic-ai": (pydantic_ai, 1, 2),
    "langgraph": (langgraph, 1, 2),
    "smolagents": (smolagents, 2, 2),
    "litellm": (litellm, 1, 2),
    "anthropic": (anthropic, 1, 2),
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("chat"), build_byte_tokenizer("<|im_end|>")
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    build_model("qwen3", std=0.1, vocab_size=len(tokenizer), max_position_embeddings=32_768, **ends).save_pretrained(folder)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"question": f"{n}: what is 2+2?"}) for n in range(4)))
    return folder


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_of_a_package_trains_unchanged(chat_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    function, rows, requests = AGENTS[name]
    sampler = Scripted(100)
    policy = build_policy(
        chat_model,
        reward=None,
        agent=FunctionAgent(function, timeout_s=60),
        sampler=sampler,
        episodes=EpisodeLimits(max_tokens=20_000, max_failed_share=0.0),
        prompts_per_rollout=2,
        samples_per_prompt=2,
    )
    data = PromptDataModule(FileSource(str(chat_model / "rows.jsonl"), answer_column=None), PlainFormat())
    log = Log()
    build_trainer(tmp_path, build_adapter(scorer=Random()), log).fit(policy, datamodule=data)
    assert len(log.batches) == 2
    for rollout in (batch.rollout for batch in log.batches):
        found = [(c.episode.turns, c.episode.counts["rows"], c.episode.rewards[-1]) for c in rollout.completions]
        assert found == [(requests, rows, 1.0), (1, 1, 0.0)] * 2
        assert sum(c.episode.counts["trained_share"] for c in rollout.completions) == 4

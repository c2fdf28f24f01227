"""Agents with chat templates: what their conversations are in tokens, and agents of real packages, unchanged, in training.

What the policy says is scripted, since no tiny policy calls tools.
"""

import json
from collections import Counter

import pytest
from chat_templates import trl_templates
from tiny_models import build_byte_tokenizer, build_model, tokens_of
from tiny_runs import Log, build_adapter, build_policy, build_trainer

from hybrid_lightning.adapters import Random
from hybrid_lightning.agents import FunctionAgent
from hybrid_lightning.data import FileSource, PlainFormat, PromptDataModule
from hybrid_lightning.environments import EpisodeLimits, HermesCalls
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import Sampled
from hybrid_lightning.rollout.playing import NOTHING, RolloutFuture, Rounds
from hybrid_lightning.types import Completion, Prompt

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

    def text(self, tokenizer, asked):
        text = "I say 5." if asked.episode % 2 else "It is 4."
        if not asked.episode % 2 and self.said[asked.episode] == 1:
            text = call("add", a=2, b=2)
        elif "final_answer" in tokenizer.decode(asked.ids):
            text = call("final_answer", answer=text)
        return text

    def say(self, tokenizer, asked):
        self.said[asked.episode] += 1
        text = self.text(tokenizer, asked)
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
        import agents

        agents.set_tracing_disabled(True)
        agent = agents.Agent(name="adder", tools=[agents.function_tool(add)], model=model_of(agents)("policy", client))
        return paid((await agents.Runner.run(agent, row["prompt"])).final_output)

    return solve


async def openai_agents_stream(row, client):
    import agents

    agents.set_tracing_disabled(True)
    model = agents.OpenAIResponsesModel("policy", client)
    streamed = agents.Runner.run_streamed(
        agents.Agent(name="adder", tools=[agents.function_tool(add)], model=model), row["prompt"]
    )
    async for _ in streamed.stream_events():
        pass
    return paid(streamed.final_output)


async def pydantic_ai(row, client):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("policy", provider=OpenAIProvider(openai_client=client)), tools=[add])
    return paid((await agent.run(row["prompt"])).output)


async def langgraph(row, client):
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="policy", base_url=row["base_url"], api_key=row["api_key"])
    found = await create_react_agent(model, [add]).ainvoke({"messages": [("user", row["prompt"])]})
    return paid(found["messages"][-1].content)


def smolagents(row, client):
    import smolagents

    model = smolagents.OpenAIServerModel("policy", api_base=row["base_url"], api_key=row["api_key"])
    agent = smolagents.ToolCallingAgent(tools=[smolagents.tool(add)], model=model, max_steps=3, verbosity_level=0)
    return paid(agent.run(row["prompt"]))


async def litellm(row, client):
    import litellm

    place = {"model": "openai/policy", "api_base": row["base_url"], "api_key": row["api_key"]}
    messages = [{"role": "user", "content": row["prompt"]}]
    answer = (await litellm.acompletion(messages=messages, tools=[TOOL], **place)).choices[0].message
    if answer.tool_calls:
        result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "4"}
        answer = (await litellm.acompletion(messages=[*messages, answer, result], tools=[TOOL], **place)).choices[0].message
    return paid(answer.content)


async def anthropic(row, client):
    import anthropic

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


# Function, the packages that it needs, and rows of an episode with a call.
AGENTS = {
    "openai": (with_openai, "", 1),
    "openai stream": (with_openai_stream, "", 1),
    "openai-agents": (openai_agents(lambda agents: agents.OpenAIResponsesModel), "agents", 1),
    "openai-agents chat": (openai_agents(lambda agents: agents.OpenAIChatCompletionsModel), "agents", 1),
    "openai-agents stream": (openai_agents_stream, "agents", 1),
    "pydantic-ai": (pydantic_ai, "pydantic_ai", 1),
    "langgraph": (langgraph, "langgraph langchain_openai", 1),
    "smolagents": (smolagents, "smolagents", 2),
    "litellm": (litellm, "litellm", 1),
    "anthropic": (anthropic, "anthropic", 1),
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


class Says(Scripted):
    """Says these texts one after the other, in each episode."""

    def text(self, tokenizer, asked):
        return self.texts[self.said[asked.episode] - 1]


@pytest.fixture
def converse(chat_model):
    """The rows of one episode in which an agent asks and the policy says given texts: tokens as text, and which were sampled."""
    policies = []

    def run(agent, *texts, **options):
        sampler = Says(200)
        sampler.texts, limits = texts, EpisodeLimits(max_tokens=5_000, max_failed_share=0.0)
        policy = build_policy(chat_model, reward=None, agent=agent, sampler=sampler, episodes=limits, **options)
        policies.append(policy)
        rollout = policy.generate([Prompt(text="2+2?")], 1)
        sequences, found = rollout.sequences, []
        for row in range(len(sequences)):
            prompt, ids = tokens_of(sequences, row)
            sampled = [token for token, own in zip(ids, sequences.sampled_mask[row].tolist(), strict=False) if own]
            found.append([policy.tokenizer.decode(part) for part in (prompt, ids, sampled)])
        return rollout.completions[0].episode, found

    yield run
    for policy in policies:
        policy.task.generation.shut_down()


def asking(*later, change=lambda message: message, **options):
    """An agent that asks, and then goes on with these messages, one after the other."""

    async def solve(row, client):
        messages = [{"role": "user", "content": row["prompt"]}]
        for new in (*later, None):
            found = await client.chat.completions.create(model="policy", messages=messages, **options)
            said = found.choices[0].message.model_dump(exclude_none=True)
            if new is not None and new["role"] == "tool":
                new = {**new, "tool_call_id": said["tool_calls"][0]["id"]}
            messages += [change(said), new]
        return 1.0

    return solve


USER = {"role": "user", "content": "Sure?"}
BEGIN, NEXT = (
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
)


def test_an_answer_that_comes_back_stands_for_its_tokens_and_a_difference_at_its_end_is_context(converse):
    episode, rows = converse(asking(USER), " 4 \n", "Yes.")
    assert rows == [[BEGIN, f" 4 \n<|im_end|>{NEXT}Yes.<|im_end|>", " 4 \n<|im_end|>Yes.<|im_end|>"]]
    assert (episode.counts["rows"], episode.counts["forks"], episode.counts["trained_share"]) == (1, 0, 1)

    def stripped(message):
        return {**message, "content": message["content"].strip()}

    episode, rows = converse(asking(USER, change=stripped), "It is 4, I think.\n", "Yes.")
    assert rows == [[BEGIN, f"It is 4, I think.<|im_end|>{NEXT}Yes.<|im_end|>", "It is 4, I think.Yes.<|im_end|>"]]
    assert (episode.counts["rows"], episode.counts["forks"]) == (1, 0) and 0.9 < episode.counts["trained_share"] < 1
    texts = [message["content"] for message in episode.messages]
    assert texts == ["2+2?", "It is 4, I think.", "Sure?", "Yes."]


def test_a_template_that_drops_earlier_thoughts_makes_rows_of_what_it_shows_and_one_that_keeps_them_makes_one(converse):
    options = {"chat_template": trl_templates().get("qwen3") or pytest.skip("needs trl")}
    texts = "<think>\nhm\n</think>\n\n4", "<think>\n\n</think>\n\nYes."
    episode, rows = converse(asking(USER), *texts, **options)
    assert episode.counts["rows"] == 2 and episode.counts["forks"] == 1 and episode.counts["trained_share"] == 1
    assert rows[0] == [BEGIN, f"{texts[0]}<|im_end|>", f"{texts[0]}<|im_end|>"]
    assert rows[1] == [f"{BEGIN}4<|im_end|>{NEXT}", f"{texts[1]}<|im_end|>", f"{texts[1]}<|im_end|>"]
    episode, rows = converse(asking(USER), *texts, chat_template="keep_history")
    assert episode.counts["rows"] == 1 and texts[0] in rows[0][1]


@pytest.mark.parametrize("shows", [True, False], ids=["shown", "described"])
def test_calls_are_read_written_by_the_template_or_described_and_answered_by_their_ids(converse, shows):
    plain = TEMPLATE if shows else TEMPLATE[TEMPLATE.index("{% for m in messages") :].partition("{% for call")[0]
    plain = plain if shows else plain + TEMPLATE[TEMPLATE.index("<|im_end|>\n{% endfor -%}\n{% if add_gen") :]
    said = call("add", a=2, b=2), "It is 4."
    result = {"role": "tool", "content": "4"}
    agent = FunctionAgent(asking(result, tools=[TOOL]), call_format=None if shows else HermesCalls())
    episode, rows = converse(agent, *said, chat_template=plain)
    ((begin, row, _),) = rows
    assert '"add"' in begin and "Add two numbers." in begin and begin.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    role = "tool" if shows else "user"
    assert row == f"{said[0]}<|im_end|>\n<|im_start|>{role}\n4<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>"
    assert (episode.counts["calls"], episode.counts["rows"], episode.counts["trained_share"]) == (1, 1, 1)
    assert [message["role"] for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.messages[1]["content"] == said[0]


def test_calls_with_wrong_arguments_are_text_for_the_agent_and_counted(converse):
    episode, rows = converse(asking(tools=[TOOL]), '<tool_call>\n{"name": "add", "arguments": "</tool_call>')
    assert episode.counts["malformed_calls"] == 1 and episode.counts.get("calls", 0) == 0 and len(rows) == 1
    episode, _ = converse(asking(tools=[TOOL], tool_choice="none"), call("add", a=2, b=2))
    assert episode.counts.get("calls", 0) == 0


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_of_a_package_trains_unchanged(chat_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    function, packages, rows = AGENTS[name]
    for package in packages.split():
        pytest.importorskip(package, exc_type=ImportError)
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
        assert found == [(2, rows, 1.0), (1, 1, 0.0)] * 2
        assert sum(c.episode.counts["trained_share"] for c in rollout.completions) == 4

"""An agent of the package openai-agents, as it would talk to any model."""

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)  # else it sends what happens to OpenAI


@function_tool
def price(order: str) -> str:
    """Return the price of an order.

    Args:
        order: Price of one and how many, with * between them, such as 347*68.
    """
    one, count = order.split("*")
    return str(int(one) * int(count))


async def solve(row, client):
    """Let the agent answer a row, and return its reward."""
    agent = Agent(name="shop", tools=[price], model=OpenAIChatCompletionsModel("policy", client))
    result = await Runner.run(agent, row["prompt"])
    return float(result.final_output == row["answer"])

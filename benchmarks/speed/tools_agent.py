"""The agent of `tools_agent.yaml`: what `ToolEnvironment` does in `configs/tools.yaml`, over the endpoint."""

import json
from typing import Any

from hybrid_lightning.environments import calculator

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOL = {"type": "function", "function": {"name": "calculator", "description": "Calculate.", "parameters": SCHEMA}}


async def solve(row: dict[str, Any], client: Any) -> float:
    """Answer calls with the calculator's results until the policy says a number."""
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    while True:
        answer = (await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])).choices[0]
        if not answer.message.tool_calls:
            right = answer.finish_reason == "stop" and answer.message.content == row["answer"]
            return float(right)
        messages.append(answer.message)
        for call in answer.message.tool_calls:
            result = calculator(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

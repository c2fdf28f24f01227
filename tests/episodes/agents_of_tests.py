"""Agents of the tests, also run as a program: `python agents_of_tests.py`."""

import asyncio
import json
import os
import sys
import time

import httpx

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "1"}]}


def talked(row, answers):
    return sum(map(len, answers)) / 100 + row.get("index", 0)


async def talk(row, client, turns=3):
    """Answers each message with its length."""
    messages, answers = [{"role": "user", "content": f"{row['prompt']}go"}], []
    for _ in range(turns):
        found = await client.chat.completions.create(model="policy", messages=messages)
        if found.choices[0].finish_reason == "length":
            break
        answers.append(found.choices[0].message.content)
        messages += [found.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": f"n{len(answers[-1])}"}]
    return talked(row, answers)


def talk_in_thread(row, client):
    """The same conversation."""
    messages, answers = [{"role": "user", "content": f"{row['prompt']}go"}], []
    for _ in range(3):
        body = post(row, {"model": "policy", "messages": messages}).json()["choices"][0]
        if body["finish_reason"] == "length":
            break
        answers.append(body["message"]["content"])
        messages += [body["message"], {"role": "user", "content": f"n{len(answers[-1])}"}]
    return talked(row, answers)


def post(row, body, path="/chat/completions", key=None, **options):
    headers = {"Authorization": f"Bearer {key or row['api_key']}"}
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(row["base_url"] + path, headers=headers, timeout=30, **given, **options)


async def rewrites(row, client):
    """Tells another conversation at its second request, asks twice at once, and again from the middle."""
    first = [{"role": "user", "content": "12+3="}]
    one = await client.chat.completions.create(model="policy", messages=first)
    told = {"role": "assistant", "content": "7" + one.choices[0].message.content}
    again = [*first, told, {"role": "user", "content": "4"}]
    both = await asyncio.gather(*(client.chat.completions.create(model="policy", messages=again) for _ in range(2)))
    said = {"role": "assistant", "content": one.choices[0].message.content}
    await client.chat.completions.create(model="policy", messages=[*first, said, {"role": "user", "content": "5"}])
    await client.chat.completions.create(model="policy", messages=[*first, said, {"role": "user", "content": "6"}])
    return float(len(both[0].choices[0].message.content))


async def raises(row, client):
    await client.chat.completions.create(**ASKED)
    raise ValueError("the board is gone")


async def hangs(row, client):
    await client.chat.completions.create(**ASKED)
    await asyncio.sleep(60)


def hangs_in_thread(row, client):
    client.chat.completions.create(**ASKED)
    time.sleep(3)


async def says_nan(row, client):
    await client.chat.completions.create(**ASKED)
    return float("nan")


async def says_text(row, client):
    await client.chat.completions.create(**ASKED)
    return "good"


async def says_nothing(row, client):
    await client.chat.completions.create(**ASKED)


async def never_asks(row, client):
    return 1.0


async def swallows(row, client):
    while True:
        try:
            await client.chat.completions.create(**ASKED)
        except Exception:
            continue


async def asks_on(row, client):
    while True:
        await client.chat.completions.create(**ASKED)


async def gives_up(row, client):
    for _ in range(2):
        try:
            async with asyncio.timeout(0.0):
                await client.chat.completions.create(**ASKED)
        except TimeoutError:
            pass
    return 1.0 + len((await client.chat.completions.create(**ASKED)).choices[0].message.content)


AGENTS = {name: value for name, value in globals().items() if callable(value)}

if __name__ == "__main__":
    given = json.load(sys.stdin)
    given["base_url"], given["api_key"] = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    kind = sys.argv[1]
    if kind == "talk":
        print("some other output")
        print(json.dumps({"reward": talk_in_thread(given, None), "parts": {"index": given.get("index", 0)}}))
        sys.exit()
    post(given, ASKED)
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "forks":
        if not os.fork():
            time.sleep(60)
        print(1.0, flush=True)
        os._exit(0)
    if kind == "fails":
        sys.exit("no such board")
    if kind == "mumbles":
        print("well")

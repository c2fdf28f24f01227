"""An environment for each set of the data, sets that rows of one table name, and tools that rows name."""

import json
import pickle

import pytest
from chat_templates import tokenizer_with
from environments_in_turns import EnvironmentsInTurns
from tiny_models import build_model, build_tokenizer
from tiny_runs import Log, OftenDone, Talk, build_data, fit

from hybrid_lightning.data import FileSource
from hybrid_lightning.environments import (
    EnvironmentBySet,
    EpisodeLimits,
    GuessNumber,
    ToolEnvironment,
    calculator,
)
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.model.prompts import PromptEncoder
from hybrid_lightning.types import Prompt

ASKED = ({"role": "user", "content": "Go."},)


def shout(text: str) -> str:
    """Say it aloud.

    Args:
        text: What.
    """
    return text.upper()


def prompt(**values):
    return Prompt(messages=ASKED, **values)


def say(text, /, **arguments):
    call = f"<tool_call>{json.dumps({'name': text, 'arguments': arguments})}</tool_call>"
    return {"role": "assistant", "content": call if arguments else text}


def prepared(environment):
    tokenizer = tokenizer_with("qwen2_5")
    environment.prepare(tokenizer.chat_template)
    encoder = TurnEncoder(PromptEncoder(tokenizer), [], environment.tools(), tools_of=environment.tools_of)
    return environment, lambda asked: tokenizer.decode(encoder.first(asked)[0]), encoder


def test_each_set_acts_in_its_own_environment_and_its_prompts_show_its_tools():
    sets = {"sums": ToolEnvironment([calculator]), "loud": ToolEnvironment([shout, calculator]), "games": GuessNumber(1, 9)}
    environment, shown, encoder = prepared(EnvironmentBySet(sets))
    prompts = [prompt(set_name=name) for name in sets]
    encoder.check(prompts, environment.added_roles())
    texts = [shown(asked) for asked in prompts]
    assert ["calculator" in text for text in texts] == [True, True, False]
    assert ["shout" in text for text in texts] == [False, True, False]
    assert [tool["function"]["name"] for tool in environment.tools()] == ["calculator", "shout"]
    assert environment.added_roles() == ("tool", "user") and not EnvironmentBySet({"": Talk()}).thread_safe
    other = pickle.loads(pickle.dumps(environment))  # as `episodes.workers` have it
    other.prepare(environment.chat_template)
    episodes = EnvironmentsInTurns(other, EpisodeLimits())
    begun = episodes.start([*prompts, prompts[2]], [3, 3, 3, 4])
    assert [*map(len, begun)] == [0, 0, 1, 1]
    answers = episodes.step({0: say("calculator", expression="2*3"), 1: say("shout", text="a"), 2: say("1"), 3: say("x")})
    assert [answers[number].messages[0]["content"] for number in (0, 1, 3)] == ["6", "A", "Say a whole number from 1 to 9."]
    assert answers[0].counts["calls"] == 1 and answers[2].messages[0]["content"] in ("higher", "right")
    assert episodes.step({0: say("6")})[0].end == "answered" and episodes.conclude([0, 1]) == {0: 0.0, 1: 0.0}
    episodes.close()
    with pytest.raises(DataError, match=r"row 4 belongs to set 'quiz', which has no environment; .* are sums, loud, games"):
        encoder.check([*prompts, prompt(set_name="quiz", index=4)], ())
    with pytest.raises(ConfigError, match="give each set one"):
        EnvironmentBySet({})


def test_a_row_names_the_tools_that_it_may_call():
    environment, shown, encoder = prepared(ToolEnvironment([calculator, shout], tools_column="tools"))
    rows = [prompt(columns={"tools": names}) for names in (["shout"], ["shout", "calculator"], [])]
    encoder.check(rows, environment.added_roles())
    assert [[name in shown(row) for name in ("calculator", "shout")] for row in rows] == [[0, 1], [1, 1], [0, 0]]
    episodes = EnvironmentsInTurns(environment, EpisodeLimits())
    episodes.start(rows, [0, 0, 0])
    answers = episodes.step(dict.fromkeys(range(3), say("calculator", expression="2*3")))
    assert answers[0].messages[0]["content"] == "error: there is no tool 'calculator'; the tools are shout"
    assert answers[0].counts["failed_calls/unknown_tool"] == 1 and answers[1].messages[0]["content"] == "6"
    assert answers[2].end == "answered", "without tools, a call is an answer"
    episodes.close()
    for names, message in (("shout", "is 'shout'; give a list of tool names"), (["sing"], "names 'sing', which is not a tool")):
        with pytest.raises(DataError, match=message):
            encoder.check([prompt(columns={"tools": names})], ())


def test_rows_of_one_table_name_their_set_and_train_in_its_environment(tmp_path):
    model = tmp_path / "model"
    build_model("llama").save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n}+{n}=", "answer": {n + n}, "kind": "{"ab"[n % 2]}"}}\n' for n in range(8)))
    log = Log()
    environment = EnvironmentBySet({"a": Talk(1), "b": Talk(2)})
    policy = {"reward": None, "turn_template": "{content}", "sampler": OftenDone(5), "environment": environment}
    policy["episodes"] = EpisodeLimits(max_tokens=60)
    fit(model, rows, tmp_path, log, policy=policy, data=build_data(rows, set_column="kind"), max_steps=1)
    assert {"sets/a/reward", "sets/b/reward"} <= log.metrics[0].keys() and 1 < log.metrics[0]["episodes/turns"] < 2
    with pytest.raises(DataError, match="has no column 'sort'; correct set_column"):
        FileSource(str(rows), set_column="sort").load()

"""What must hold for any call of a tool: it is read as its chat template writes it, with the types of the tool's schema."""

import json

import pytest
from chat_templates import WITH_CALLS, tokenizer_with
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_lightning.environments import Call
from hybrid_lightning.environments.tagged_calls import choose_format

ASKED = [{"role": "user", "content": "Find it."}]
PROPERTIES = {
    "query": {"type": "string"},
    "limit": {"type": "integer"},
    "exact": {"type": "boolean"},
    "share": {"type": "number"},
    "tags": {"type": "array"},
    "options": {"type": "object"},
    "note": {"type": "string", "nullable": True},
    "page": {"type": ["integer", "string"]},
}


def tool(name):
    parameters = {"type": "object", "properties": PROPERTIES}
    return {"type": "function", "function": {"name": name, "description": "Find.", "parameters": parameters}}


TOOLS = [tool("find"), tool("find-all.now")]


def not_json(text):
    """Whether a text cannot be taken for a value of another type."""
    try:
        json.loads(text)
    except ValueError:
        return text.strip() not in ("True", "False", "None")
    return False


CHARACTERS = st.one_of(
    st.sampled_from("'\"\\\n ,=(){}[]:ntux0é語"), st.characters(codec="utf-8", categories=("L", "N", "P", "S"))
)
texts = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.sampled_from([r"C:\new", "it's", "print('a')\n", "3", "None", "null", "true", '{"a": 1}']),
)
numbers = st.integers(-(10**12), 10**12)
floats = st.floats(-1e6, 1e6).map(lambda number: round(number, 4))
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "query": texts,
        "limit": numbers,
        "exact": st.booleans(),
        "share": floats,
        "tags": st.lists(values, max_size=3),
        "options": st.dictionaries(st.sampled_from("abc"), values, max_size=2),
        "note": st.none() | texts.filter(not_json),
        "page": numbers | texts.filter(not_json),
    },
)
calls = st.tuples(st.sampled_from(["find", "find-all.now"]), arguments)


@pytest.mark.parametrize("name", WITH_CALLS)
def test_a_call_is_read_as_its_chat_template_writes_it(name):
    tokenizer = tokenizer_with(name, "<|im_end|>")
    form = choose_format(tokenizer.chat_template)

    def rendered(*said, opens=False):
        return tokenizer.apply_chat_template([*ASKED, *said], tools=TOOLS, tokenize=False, add_generation_prompt=opens)

    closed, opened = rendered(), rendered(opens=True)

    @settings(max_examples=25, deadline=None)
    @given(calls, st.integers(0, 100))
    @example(("find", {"query": r"C:\new", "note": None, "page": 3}), 0)
    @example(("find", {"query": "None", "note": "it's", "page": "a"}), 0)
    def holds(call, cut):
        function = {"name": call[0], "arguments": json.dumps(call[1]) if name == "deepseekv3" else call[1]}
        whole = rendered(
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]}
        )
        said = whole.removeprefix(opened if whole.startswith(opened) else closed)
        assert form.parse(said, TOOLS) == [Call(*call)]
        form.parse(said[: len(said) - cut] + said[cut:], TOOLS)  # whatever it finds, it does not raise

    holds()

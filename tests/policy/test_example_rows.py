"""Examples as tokens, and what is refused at start."""

import pytest
from tiny_examples import build_examples, build_module, write_rows
from tiny_models import build_tokenizer
from tiny_runs import build_adapter, build_trainer, write_model

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.policy.prompts import PromptEncoder
from hybrid_lightning.types import Prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("examples") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("examples") / "rows.jsonl")


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}#{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a#{% endif %}"
)


def test_a_chat_completion_is_what_the_template_writes_up_to_its_end():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    prompt = Prompt(messages=({"role": "user", "content": "1+2"},))
    ids = PromptEncoder(tokenizer, TEMPLATE).encode_completion(prompt, "3", [2])
    assert tokenizer.decode(ids) == "3<eos>"
    plain = PromptEncoder(tokenizer).encode_completion(Prompt(text="1+2="), "3", [2])
    assert plain == [*tokenizer("3").input_ids, 2]
    with pytest.raises(ConfigError, match="otherwise once it is answered"):
        PromptEncoder(tokenizer, "{{ messages|length }}").encode_completion(prompt, "3", [2])


@pytest.mark.parametrize(
    ("kind", "format", "arguments", "error", "message"),
    [
        (
            "supervised",
            "preference",
            {},
            DataError,
            r"row \d+ has 2 completions, but SupervisedModule needs one: give data.format=",
        ),
        ("preference", "supervised", {}, DataError, r"has 1 completions, but PreferenceModule needs two"),
        ("supervised", "supervised", {"examples_per_step": 26}, ConfigError, "examples_per_step=26 is more than the 24"),
        ("supervised", "supervised", {"examples_per_step": 0}, ConfigError, "examples_per_step must be at least 1, got 0"),
        (
            "supervised",
            "supervised",
            {"examples_per_step": 7},
            ConfigError,
            "examples_per_step=7 must be a multiple of the 1 devices",
        ),
    ],
)
def test_what_is_refused_at_start(kind, format, arguments, error, message, model, rows, tmp_path):
    with pytest.raises(error, match=message):
        trainer = build_trainer(tmp_path, build_adapter(), accumulate_grad_batches=2)
        trainer.fit(build_module(kind, model, **arguments), datamodule=build_examples(format, rows))


def test_a_row_that_the_model_cannot_read_is_refused_by_its_number(model, rows, tmp_path):
    module = build_module("supervised", model)
    long = Prompt(text="1+1=", completions=("2" * 130,), index=7, source="rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl row 7 has 135 tokens \(4 of the prompt\), more than the 128"):
        module.check_prompts([long])

import pytest
from tiny_models import build_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.model.prompts import PromptEncoder
from hybrid_lightning.types import Prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}#{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a#{% if thinking %}think{% endif %}{% endif %}"
)
ANSWERED = (
    "{% for m in messages %}{{ m['role'][0] }}#{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a#{% endif %}"
)
CHAT = Prompt(messages=({"role": "system", "content": "add"}, {"role": "user", "content": "1+2"}))


def with_special_tokens(pattern):
    """The tokenizer, changed to write special tokens around every text, as many do."""
    tokenizer = build_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return tokenizer


def test_a_prompt_begins_as_the_tokenizer_says_but_never_ends_and_messages_have_an_open_answer():
    prompt, plain = Prompt(text="1+2="), build_tokenizer()("1+2=").input_ids
    encoder = PromptEncoder(build_tokenizer())
    assert encoder.render(prompt) == "1+2=" and encoder.encode(prompt) == plain
    assert PromptEncoder(with_special_tokens("<bos> $A <eos>")).encode(prompt) == [1, *plain]
    assert PromptEncoder(with_special_tokens("$A <eos> <eos>")).encode(prompt) == plain
    encoder = PromptEncoder(with_special_tokens("<bos> $A <eos>"), TEMPLATE)
    assert encoder.render(CHAT) == "<bos>s#add\nu#1+2\na#"
    assert encoder.encode(CHAT) == [1, *build_tokenizer()("s#add\nu#1+2\na#").input_ids]
    assert PromptEncoder(build_tokenizer(), TEMPLATE, {"thinking": True}).render(CHAT).endswith("a#think")


def test_the_template_given_comes_before_the_tokenizers_and_one_has_to_be():
    tokenizer = build_tokenizer()
    with pytest.raises(ConfigError, match=r"no chat template; set model\.chat_template"):
        PromptEncoder(tokenizer).encode(CHAT)
    tokenizer.chat_template = "tokenizer{{ messages|length }}"
    assert PromptEncoder(tokenizer).render(CHAT) == "tokenizer2"
    assert PromptEncoder(tokenizer, "mine").render(CHAT) == "mine"


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        ("{{ raise_exception('no system role') }}", r"change data\.format \(for no system role: system_prompt=null, .*\) or"),
        ("{% for %}", r"change data\.format or model\.chat_template"),
    ],
)
def test_a_template_that_fails_names_the_row(template, remedy):
    prompt = Prompt(messages=CHAT.messages, index=7, source="sums.jsonl")
    with pytest.raises(ConfigError, match=rf"refuses the prompt of sums\.jsonl row 7: .*; {remedy}"):
        PromptEncoder(build_tokenizer(), template).encode(prompt)


def test_an_empty_prompt_and_text_outside_of_the_vocabulary_are_refused():
    for prompt in (Prompt(text="", index=3), Prompt(messages=CHAT.messages, index=3)):
        with pytest.raises(DataError, match="prompt of the data row 3 is empty"):
            PromptEncoder(build_tokenizer(), "{# nothing #}").encode(prompt)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(embedded_policy_path()))
    assert encoder.encode(Prompt(text="12*3="))
    with pytest.raises(DataError, match=r"cannot encode the prompt of q\.csv row 3, which begins '.*: .*use another model"):
        encoder.encode(Prompt(text="How many?", index=3, source="q.csv"))


def test_a_chat_completion_is_what_the_template_writes_up_to_its_end():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    prompt = Prompt(messages=({"role": "user", "content": "1+2"},))
    ids = PromptEncoder(tokenizer, ANSWERED).encode_completion(prompt, "3", [2])
    assert tokenizer.decode(ids) == "3<eos>"
    plain = PromptEncoder(tokenizer).encode_completion(Prompt(text="1+2="), "3", [2])
    assert plain == [*tokenizer("3").input_ids, 2]
    with pytest.raises(ConfigError, match="changes the prompt of"):
        PromptEncoder(tokenizer, "{{ messages|length }}").encode_completion(prompt, "3", [2])

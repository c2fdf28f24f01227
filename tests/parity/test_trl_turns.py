"""Tokens that are added behind a turn against the code of TRL's trainer, called with a stand-in for the trainer."""

from types import SimpleNamespace

import pytest
from chat_templates import tokenizer_with

from hybrid_lightning.policy.prompts import PromptEncoder
from hybrid_lightning.policy.turns import TurnEncoder
from hybrid_lightning.types import Prompt

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer.grpo_trainer import GRPOTrainer


@pytest.mark.parametrize(
    ("name", "eos"),
    [("qwen2_5", "<|im_end|>"), ("qwen3_training", "<|im_end|>"), ("llama3_1", "<|eot_id|>")],
)
def test_results_of_tools_are_the_same_tokens(name, eos):
    tokenizer = tokenizer_with(name, eos)
    variables = {"enable_thinking": False} if name == "qwen3_training" else {}
    results = [{"role": "tool", "name": "add", "content": "3 <end>"}, {"role": "tool", "name": "add", "content": ""}]
    trainer = SimpleNamespace(processing_class=tokenizer, _tokenizer=tokenizer, _is_vlm=False, chat_template=None)
    expected = GRPOTrainer._get_tool_suffix_ids(SimpleNamespace(**vars(trainer), chat_template_kwargs=variables), results)
    turns = TurnEncoder(PromptEncoder(tokenizer, None, variables), [tokenizer.eos_token_id])
    prompt = Prompt(messages=({"role": "user", "content": "1+2?"},))
    assert turns.added(prompt, results, [5, tokenizer.eos_token_id]) == expected

"""Experts in three-dimensional parameters on two ranks: scored, trained fully and by LoRA, and sent, as by one process."""

import pytest
import torch
from runs_of_tests import ADAM, STRATEGIES, ByPrompt, Streamed, assert_same_run
from tiny_families import build_family
from tiny_models import build_tokenizer
from tiny_runs import write_sums

from hybrid_lightning.adapters import TailEnergy


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    build_family("qwen3_moe", num_hidden_layers=2).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "sums.jsonl", 24)
    return folder


def job(**flags):
    """Full training of all modules but one layer's experts, which have LoRA."""
    adapter = {"rank_pattern": {"experts": 3}, "scorer": TailEnergy(), "share": 0.9}
    return {"max_steps": 2, "policy": {"sampler": ByPrompt(12), **ADAM}, "adapter": adapter, "callbacks": (Streamed(),), **flags}


@pytest.mark.long
def test_it_is_the_same_run(experts, train_on):
    whole = train_on(1, {"one": job()}, folder=experts)[0]["one"]
    modes = {module["mode"] for module in whole["plan"]["candidates"] if module["name"].endswith("experts")}
    assert modes == {"full", "lora"}
    for rank in train_on(2, {under: job(strategy=STRATEGIES[under]) for under in STRATEGIES}, folder=experts):
        for under, result in rank.items():
            assert_same_run(result, whole, under)
            torch.testing.assert_close(result["held"]["weights"], whole["held"]["weights"], atol=1e-5, rtol=0)

"""Completions that never end by themselves have the full length, with several optimizer steps a rollout."""

import json

import pytest
from benchmark_modules import fork_workers, pairs, prepare, workloads
from tiny_models import build_model, build_tokenizer


def test_full_length(tmp_path, monkeypatch):
    fork_workers(monkeypatch)
    load = workloads.Workload(
        "main", prompts=2, samples=2, prompt_tokens=8, max_new_tokens=5, mean_tokens=5, minibatches=2, dtype="float32", rank=2
    )
    model, tokenizer = build_model("llama"), build_tokenizer()
    prompts = prepare.prepare(load, model, tokenizer, 2, 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    plan = pairs.Plan(pairs=1, device="cpu", threads=1, seed=0, sides=("ours",), logs=tmp_path)
    measured = pairs.compare(load, tmp_path, plan, tell=lambda line: None)
    steps = measured["steps"]["ours"]
    assert [step["lengths"] for step in steps] == [[5] * 4, [5] * 4]
    assert [step["optimizer_steps"] for step in steps] == [2, 4]


@pytest.mark.parametrize("lengths", [[5] * 3, [5, 5, 5, 4], [5, 5, 5, 6]])
def test_anything_else_ends_the_comparison(lengths):
    load = workloads.Workload("main", prompts=2, samples=2, max_new_tokens=5, mean_tokens=5)
    pairs.check_lengths(load, "ours", [5] * 4)
    with pytest.raises(pairs.BenchmarkError, match="where 4 of 5 to 5 are wanted"):
        pairs.check_lengths(load, "ours", lengths)

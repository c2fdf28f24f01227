"""From configs/gspo.yaml to a model that plain transformers loads: a wrapper as the hub has it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import PARTS, done, run
from safetensors import safe_open
from tiny_families import build_family
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lightning.data import ProductSource

CONFIG = Path(__file__).parents[2] / "configs" / "gspo.yaml"
PROBLEMS, TOKENS = 24, 6
SMALL = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0"]
SMALL += ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4", "--adapter.calibration_prompts=8"]
SMALL += ["--data.validation_prompts=null", f"--model.sampler.max_new_tokens={TOKENS}"]
SMALL += ["--trainer.enable_progress_bar=false", "--model.lr_lora=0.03", "--model.lr_full=0.003"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_parts", None)


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def greedy_accuracy(folder):
    """Share of the validation's problems with a greedy completion that begins with a digit, by plain transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = []
    for row in ProductSource(low=10, high=999, validation_size=PROBLEMS, test_size=400, seed=0).load().validation:
        ids = torch.tensor([tokenizer(row.question).input_ids])
        completion = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :]
        right.append(tokenizer.decode(completion, skip_special_tokens=True)[:1].isdigit())
    return sum(right) / len(right)


def test_the_export_of_a_hybrid_run_is_as_accurate_in_plain_transformers(here, caplog):
    build_family("qwen3_5", std=0.1).save_pretrained(here / "model")
    build_tokenizer().save_pretrained(here / "model")
    given = [f"--config={CONFIG}", "--model.model=model", "--model.reward=my_parts.StartsWithDigit", *SMALL]
    given.append(f"--data.source.init_args.validation_size={PROBLEMS}")
    done(here, "fit", *given)
    folder = here / "runs" / "gspo" / "version_0"
    plan = json.loads((folder / "plan.json").read_text())
    assert {module["mode"] for module in plan["candidates"]} == {"full", "lora"}
    done(here, "export", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--folder=out")
    assert json.loads((here / "out" / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    there, exported = names_in(here / "model"), names_in(here / "out")
    assert exported <= there and not any("visual" in name for name in exported), "the names of the hub"
    assert "vision tower, are left out" in caplog.text
    measured = json.loads((folder / "evaluation.json").read_text())["overall"]["greedy_accuracy"]
    assert 0 < measured < 1 and greedy_accuracy(here / "out") == pytest.approx(measured)


def test_rows_with_images_are_refused_in_one_line(here):
    """Unless they are left out."""
    build_family("gemma3", std=0.1).save_pretrained(here / "model")
    build_tokenizer().save_pretrained(here / "model")
    part = {"type": "image", "url": "there.png"}
    rows = [{"question": f"{i}+1=", "answer": str(i + 1), "image": [part] if i == 1 else None} for i in range(8)]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"--config={CONFIG}", "--model.model=model", "--data.source=FileSource", "--data.source.train=rows.jsonl"]
    result = run(here, "fit", *given, "--data.source.validation_fraction=0.3", *SMALL)
    assert "row 1 (the first is 0): column 'image' has an image, but a policy reads only text" in result.last
    done(here, "plan", *given, "--data.source.skip_bad_rows=true")

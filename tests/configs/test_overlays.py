"""Overlays are read by the real command line over a config with other values, and train or evaluate with it.

No config is in the way of one and not of another: `test_configs` shows that overlays of different kinds set different things. How
runs go under each strategy is in `tests/sharding`, and with the losses and adapters that do not train here in `tests/hub`.
"""

import json
import tempfile
from itertools import cycle
from typing import Any

import pytest
import yaml
from cli_runs import command, parse
from test_configs import CONFIGS, ROOT, small

FOLDERS = ("strategy", "rollout", "loss", "device", "quantization", "logger", "reward")
OVERLAYS = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
WITH_ROLLOUTS = [path for path in CONFIGS if path.stem not in ("sft", "dpo")]


def named(path):
    return yaml.safe_load(path.read_text())


def includes(found: Any, wanted: Any) -> bool:
    """Whether a parsed value has every value of a YAML; a class may be named by its short name."""
    if isinstance(wanted, dict):
        if "class_path" not in wanted and "init_args" in found:
            found = found["init_args"]
        return all(includes(found[name], value) for name, value in wanted.items())
    if isinstance(wanted, list):
        return all(includes(*pair) for pair in zip(found, wanted, strict=True))
    return found == wanted or str(found).endswith(f".{wanted}")


@pytest.mark.parametrize(
    ("overlay", "config"), list(zip(OVERLAYS, cycle(WITH_ROLLOUTS))), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_an_overlay_goes_over_a_config_and_keeps_the_rest(overlay, config, here, monkeypatch):
    nodes = ["--trainer.devices=8", "--trainer.num_nodes=4"]
    parsed = parse(["fit", "--config", str(config), "--config", str(overlay), *nodes], monkeypatch)
    wanted = {"trainer": {}, **named(overlay)}
    wanted["trainer"].pop("devices", None)
    assert includes(parsed, wanted) and (str(parsed.trainer.devices), parsed.trainer.num_nodes) == ("8", 4)
    assert parsed.trainer.max_steps == named(config)["trainer"]["max_steps"]
    own = named(config)["model"].get("sampler", {}).get("init_args", {})
    if overlay.parent.name == "rollout":
        assert includes(parsed.model.init_args.sampler.init_args, own), "another sampler class keeps these settings"


# ---- environments, with their packages

CHAT = ROOT / "configs" / "qwen3.yaml"
LORA = ROOT / "configs" / "adapter" / "lora.yaml"  # a random policy earns nothing by which modules could be scored


ENVIRONMENTS = sorted((ROOT / "configs" / "environment").glob("*.yaml"))
ENVIRONMENTS += [ROOT / "examples" / "agent_frameworks" / f"{package}.yaml" for package in ("textarena", "textworld")]


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_trains(path, tiny, here, monkeypatch):
    pytest.importorskip(path.stem, reason=f"needs {path.stem}, which {path.relative_to(ROOT)} says how to install")
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    monkeypatch.syspath_prepend(path.parent)
    count = {"reasoning_gym": "size"}.get(path.stem, "count")
    sizes = {count: 4, f"validation_{count}": 2, f"test_{count}": 0}
    options = [f"--model.model={tiny}", "--model.dtype=float32", "--trainer.precision=32-true", "--model.eval_samples=1"]
    options += [f"--data.source.{name}={value}" for name, value in sizes.items()]
    options += ["--model.episodes.max_turns=2", "--model.episodes.max_tokens=1500", "--checkpoint.monitor=val/avg@1"]
    command(["fit", *(f"--config={config}" for config in (CHAT, path, LORA)), *small(named(CHAT)), *options], monkeypatch)
    (folder,) = (here / "runs" / "qwen3").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


# ---- evaluation, which takes a model and rows, and nothing else

EVALUATE = ["--config", str(ROOT / "configs" / "evaluate.yaml")]
FEW = ["--model.sampler.max_new_tokens=5", "--model.eval_samples=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SETS = """
data:
  source:
    class_path: Mixture
    init_args:
      sources:
        quiz: {class_path: FileSource, init_args: {test: rows.jsonl}}
        riddles: {class_path: FileSource, init_args: {test: rows.jsonl, max_rows: 2}}
"""


def test_a_model_and_rows_are_enough_and_several_named_sets_go_over_it(tiny, here, monkeypatch, capsys):
    (here / "rows.jsonl").write_text("".join(f'{{"question": "{n} + 1?", "answer": {n + 1}}}\n' for n in range(3)))
    (here / "sets.yaml").write_text(SETS)
    given = ["test", *EVALUATE, f"--model.model={tiny}", "--trainer.enable_progress_bar=false", *FEW]
    command([*given, "--data.source.test=rows.jsonl"], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_0" / "evaluation.json").read_text())
    assert report["model"] == str(tiny) and report["overall"]["problems"] == 3 and report["sets"] == {}
    assert {"avg@2", "pass@2", "maj@2", "greedy_accuracy/ci_high"} < report["overall"].keys()
    assert "adapter plan" not in capsys.readouterr().out.lower() and not list(here.rglob("plan.json")), "nothing is adapted"
    command([*given, "--config", "sets.yaml"], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_1" / "evaluation.json").read_text())
    assert {name: values["problems"] for name, values in report["sets"].items()} == {"quiz": 3, "riddles": 2}

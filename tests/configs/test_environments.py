"""Overlays of environments, with their packages, over a config of a chat model, by the real command line."""

import json

import pytest
import yaml
from cli_runs import command
from test_configs import ROOT, small

PACKAGES = {"gem": "gem", "textarena": "textarena", "textworld": "textworld", "reasoning_gym": "reasoning_gym"}
CONFIG = ROOT / "configs" / "qwen3.yaml"
LORA = ROOT / "configs" / "adapter" / "lora.yaml"  # a random policy earns nothing by which modules could be scored


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "environment").glob("*.yaml")), ids=lambda path: path.stem)
def test_it_trains(path, tiny, here, monkeypatch):
    package = PACKAGES[path.stem]
    pytest.importorskip(package, reason=f"needs {package}: pip install 'hybrid-lightning[environments]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    count = {"reasoning_gym": "size"}.get(path.stem, "count")
    sizes = {count: 4, f"validation_{count}": 2, f"test_{count}": 0}
    given = [f"--data.source.{name}={value}" for name, value in sizes.items()]
    options = [f"--model.model={tiny}", "--model.dtype=float32", "--trainer.precision=32-true", "--model.eval_samples=1", *given]
    episodes = ["--model.episodes.max_turns=2", "--model.episodes.max_tokens=1500", "--checkpoint.monitor=val/avg@1"]
    command(
        [
            "fit",
            f"--config={CONFIG}",
            f"--config={path}",
            f"--config={LORA}",
            *small(yaml.safe_load(CONFIG.read_text())),
            *options,
            *episodes,
        ],
        monkeypatch,
    )
    (folder,) = (here / "runs" / "qwen3").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2

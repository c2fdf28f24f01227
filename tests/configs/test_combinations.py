"""The reported setting: overlays of data, method and loss over configs/qwen3.yaml, built on a tiny model."""

from itertools import combinations

import pytest
import yaml
from test_configs import ROOT, here, run, tiny  # noqa: F401  (fixtures)

from hybrid_lightning import cli
from hybrid_lightning.callbacks import HybridAdapterSetup

DATA = {None: "MathMatch", "leetcode": "CodeTests", "mmlu_pro": "MultipleChoice", "mixture": "RewardBySet"}
METHODS = {None: (0.1, False), "full": (1.0, False), "lora": (0.0, False), "dora": (0.0, True)}
LOSSES = {None: "GSPOLoss", "grpo": "GRPOLoss", "gspo": "GSPOLoss"}


@pytest.mark.parametrize(
    ("data", "method", "loss"),
    [(None, None, None), ("leetcode", "full", "grpo"), ("mmlu_pro", "lora", "gspo"), ("mixture", "dora", "grpo")],
)
def test_it_is_built(data, method, loss, tiny, here, monkeypatch):  # noqa: F811
    built = []
    monkeypatch.setattr(cli.HybridLightningCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    overlays = [("data", data), ("adapter", method), ("loss", loss)]
    given = [f"--config={ROOT / 'configs' / folder / name}.yaml" for folder, name in overlays if name is not None]
    base = f"--config={ROOT / 'configs' / 'qwen3.yaml'}"
    run(["fit", base, *given, f"--model.model={tiny}", "--trainer.accelerator=cpu"], monkeypatch)
    model, data_module, trainer = built[0].model, built[0].datamodule, built[0].trainer
    (adapter,) = (callback for callback in trainer.callbacks if isinstance(callback, HybridAdapterSetup))
    assert type(model.loss).__name__ == LOSSES[loss] and type(model.reward).__name__ == DATA[data]
    assert (adapter.budget.share, adapter.lora.use_dora) == METHODS[method]
    assert data_module.max_prompt_tokens == 1024 and model.sampler.max_new_tokens == 4096
    if data in (None, "mixture"):
        assert "dapo" in data_module.source.sources


def keys(folder):
    """What the overlays of a folder set, as `section.name`."""
    overlays = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / folder).glob("*.yaml")]
    return {f"{section}.{name}" for overlay in overlays for section, values in overlay.items() for name in values}


def test_overlays_of_different_kinds_set_different_things():
    """So that any combination of them is what each of them says."""
    for one, other in combinations(("data", "adapter", "loss", "rollout", "strategy"), 2):
        assert keys(one) and not keys(one) & keys(other), (one, other)

"""Every loss overlay goes over a config of another loss."""

import json
from pathlib import Path

import pytest
import yaml
from cli_runs import done, parse

OVERLAYS = sorted((Path(__file__).parents[2] / "configs" / "loss").glob("*.yaml"))
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=0",
    "--adapter.calibration_prompts=4",
    "--model.sampler.max_new_tokens=4",
]
REWARD = """
model:
  reward:
    class_path: WeightedSum
    init_args:
      rewards:
        - {class_path: my_parts.StartsWithDigit}
        - {class_path: OverlongPenalty, init_args: {max_tokens: 6, buffer_tokens: 3}}
      weights: [1.0, 0.5]
"""


def short(part):
    return part["class_path"].rpartition(".")[2], part.get("init_args", {})


# What is given beside an overlay, with which it trains, too; that the others train is seen with the hub.
BESIDE = {
    "dapo": ["--config", "reward.yaml"],
    "top_entropy": ["--config", "reward.yaml", "--model.loss.entropy_coef=0.01", "--model.advantage=PerRewardAdvantage"],
}


@pytest.mark.filterwarnings("ignore:nothing is learned from .* of a rollout's groups")  # two steps of a policy that hardly earns
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_goes_over_a_config_of_another_loss(folder, overlay, monkeypatch):
    (folder / "reward.yaml").write_text(REWARD)
    monkeypatch.chdir(folder)
    given = ["fit", "--config", "t.yaml", "--config", str(overlay), *BESIDE.get(overlay.stem, [])]
    used = parse(given, monkeypatch).model.init_args
    for name, wanted in yaml.safe_load(overlay.read_text())["model"].items():
        if isinstance(wanted, dict):
            (cls, arguments), (found, resolved) = short(wanted), short(used[name])
            assert found == cls and {key: resolved[key] for key in arguments} == arguments
        else:
            assert used[name] == wanted
    if overlay.stem in BESIDE:
        done(folder, *given, *SHORT, f"--trainer.logger.init_args.name={overlay.stem}")
        root = folder / "runs" / overlay.stem / "version_0"
        assert json.loads((root / "summary.json").read_text())["steps"] == 2
    if overlay.stem == "top_entropy":
        used = yaml.safe_load((root / "config.yaml").read_text())["model"]["init_args"]
        assert used["loss"]["init_args"]["entropy_coef"] == 0.01 and short(used["advantage"])[0] == "PerRewardAdvantage"

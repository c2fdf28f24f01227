"""Every data overlay is read over a config of another data set, and gives prompts that its reward can score."""

from pathlib import Path

import pytest
import yaml
from cli_runs import done, parse, write_folder
from hub_contents import write_data_sets
from jsonargparse import ArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_lightning import data
from hybrid_lightning.data import PromptFormat, PromptSource
from hybrid_lightning.rewards import RewardFunction

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "configs" / "data").glob("*.yaml"))
# Rows for training, validation and test of each set.
SIZES = {
    "gsm8k": {"": (48, 2, 12)},
    "math": {"math": (47, 2, 0), "math500": (0, 0, 6)},  # of 50, one of which MATH-500 asks too
    "dapo_math": {"dapo": (231, 0, 0), "aime24": (0, 8, 0), "aime25": (0, 0, 8), "amc23": (0, 0, 8), "math500": (0, 0, 6)},
    "mmlu_pro": {"": (32, 5, 8)},
    "leetcode": {"": (34, 1, 3)},
    "mixture": {"dapo": (230, 1, 0), "aime24": (0, 0, 8), "leetcode": (34, 1, 3), "mmlu_pro": (32, 5, 8)},
}
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--adapter.calibration_prompts=4",
    "--adapter.scorer=Random",
    "--model.sampler.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data_sets(folder)
    yield from write_folder(folder)


def local(part):
    """The same source on local copies."""
    given = dict(part.get("init_args", {}))
    if "sources" in given:
        return {**part, "init_args": {**given, "sources": {name: local(source) for name, source in given["sources"].items()}}}
    return {**part, "init_args": {**given, "local_path": getattr(data, part["class_path"]).hub_path}}


def over(base, overlay, folder, monkeypatch):
    """Reward, source and format of the two configs, as the command line merges them."""
    config = yaml.safe_load(overlay.read_text())
    config["data"]["source"] = local(config["data"]["source"])
    (folder / "overlay.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    parsed = parse(["fit", "--config", str(base), "--config", "overlay.yaml"], monkeypatch)
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in (("reward", RewardFunction), ("source", PromptSource), ("format", PromptFormat)):
        parser.add_argument(f"--{name}", type=kind)
    read = parsed.data.init_args
    given = {"reward": parsed.model.init_args.reward, "source": read.source, "format": read.format}
    made = parser.instantiate(parser.parse_object(given))
    return made.reward, made.source, made.format


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_gives_prompts_that_its_reward_can_score(overlay, folder, monkeypatch):
    reward, source, formats = over(ROOT / "configs" / "gsm8k_qwen3.yaml", overlay, folder, monkeypatch)
    splits = source.load()
    for name, sizes in SIZES[overlay.stem].items():
        assert tuple(sum(row.set_name == name for row in rows) for rows in vars(splits).values()) == sizes, name
    assert {row.set_name for rows in vars(splits).values() for row in rows} == set(SIZES[overlay.stem])
    for rows in vars(splits).values():
        for row in rows[:40]:
            prompt = formats.format(row)
            reward.check_prompt(prompt)
            assert prompt.messages[-1] == {"role": "user", "content": row.question} and prompt.set_name == row.set_name


@pytest.mark.filterwarnings("ignore:two runs with one seed may differ")  # programs have a time limit
def test_a_mixture_trains_with_each_set_logged(folder, tiny):
    config = yaml.safe_load((ROOT / "configs" / "data" / "mixture.yaml").read_text())
    config["data"]["source"] = local(config["data"]["source"])
    # A user's own reward for one set, in a file beside the config.
    (folder / "mine.py").write_text("async def digits(completion, answer):\n    return float(completion[:1] == answer[:1])\n")
    own = {"class_path": "FunctionReward", "init_args": {"function": "mine.py:digits", "timeout_s": 20}}
    config["model"]["reward"]["init_args"]["rewards"]["dapo"] = own
    (folder / "mixture.yaml").write_text(yaml.safe_dump(config))
    done(folder, "fit", "--config", "t.yaml", "--config", "mixture.yaml", f"--model.model={tiny}", *SHORT)
    events = EventAccumulator(str(next((folder / "runs" / "default").glob("version_*")))).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("dapo", "leetcode", "mmlu_pro"):
        assert any(tag.endswith(f"sets/{name}/accuracy") for tag in tags), sorted(tags)

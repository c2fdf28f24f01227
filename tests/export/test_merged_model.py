"""The merged model; that transformers loads it is in `test_adapter_folder`, beside the adapter of the same policies."""

import dataclasses
import json

import pytest
import torch
from chat_templates import tokenizer_with
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.export import AdapterFolder, MergedModel, write_policy
from hybrid_lightning.export.trained import Training
from hybrid_lightning.export.write import written_message
from hybrid_lightning.model.loading import ModelSource
from hybrid_lightning.rollout.interface import PEFT_PREFIX


@pytest.mark.parametrize(("base", "wanted", "keep"), [("float32", "bfloat16", True), ("bfloat16", "float16", False)])
def test_sixteen_bits_are_the_exact_sum_rounded_once(train, tmp_path, base, wanted, keep):
    trained = train(dtype=base, keep_start_weights=keep)
    exact, rounded = (
        load_file(write_policy(trained.policy, MergedModel(dtype), tmp_path / dtype) / "model.safetensors")
        for dtype in ("float32", wanted)
    )
    dtype = getattr(torch, wanted)
    assert exact.keys() == rounded.keys() and {weight.dtype for weight in rounded.values()} == {dtype}
    assert all(torch.equal(rounded[name], weight.to(dtype)) for name, weight in exact.items())
    assert json.loads((tmp_path / wanted / "config.json").read_text())["dtype"] == wanted
    for name in trained.policy.plan.full_modules:
        assert torch.equal(exact[f"{name}.weight"], trained.policy.weights[f"{PEFT_PREFIX}{name}.weight"])


def test_tokenizer_template_and_generation_config_come_along(train, tmp_path):
    trained = train(chat_template="{{ messages[0].content }}=")
    # many bases have this: transformers reads a temperature without do_sample, but refuses to write it
    path = tmp_path / "base-llama" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [2, 7], "bos_token_id": 1}))
    folder = write_policy(trained.policy, MergedModel(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False) == "1+1="
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [2, 7] and settings.pad_token_id == tokenizer.pad_token_id == 0
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.9, True)


@pytest.mark.parametrize(("environment", "ends"), [(None, ["<|eos|>"]), ({}, ["<|eos|>", "<|eot_id|>", "<|eom_id|>"])])
def test_the_model_stops_where_episodes_did(train, tmp_path, environment, ends):
    policy = train(training=Training(steps=3, arguments={"environment": environment})).policy
    tokenizer = tokenizer_with("llama3_1", "<|eos|>")
    tokenizer.save_pretrained(policy.base.model)
    stops = GenerationConfig.from_pretrained(write_policy(policy, MergedModel(), tmp_path / "out")).eos_token_id
    own = GenerationConfig.from_pretrained(policy.base.model).eos_token_id
    assert set(stops) == {own, *tokenizer.convert_tokens_to_ids(ends)}


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "is not finite"), (1e5, r"does not fit torch\.float16")])
def test_weights_that_a_model_cannot_hold_are_refused(train, tmp_path, value, message):
    trained = train()
    weights = {name: weight.clone() for name, weight in trained.policy.weights.items()}
    weights[f"{PEFT_PREFIX}{trained.policy.plan.full_modules[0]}.weight"][0, 0] = value
    policy = dataclasses.replace(trained.policy, weights=weights)
    with pytest.raises(ModelError, match=rf"{trained.policy.plan.full_modules[0]}\.weight {message}"):
        write_policy(policy, MergedModel("float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_is_noticed():
    with pytest.raises(ConfigError, match=r"form\.dtype must be one of .*, got 'int8'"):
        MergedModel("int8")


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_the_dtype_comes_from_the_bases_config_or_else_from_training(train, tmp_path, stored, monkeypatch):
    trained = train(dtype=stored)
    folder = write_policy(trained.policy, MergedModel(), tmp_path / "out")
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {getattr(torch, stored)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == stored
    assert f"The weights here are {stored}." in (folder / "README.md").read_text()
    for form, dtype in ((MergedModel(), stored), (MergedModel("float16"), "float16"), (AdapterFolder(), "float32")):
        assert written_message(trained.policy, form, folder) == f"Policy written to {folder} in {dtype}"
    path, base = tmp_path / "base-llama" / "config.json", trained.policy.base
    config = json.loads(path.read_text())
    base.dtype = "bfloat16"
    for said, expected in (("float16", "float16"), (None, "bfloat16"), ("float64", "bfloat16")):
        path.write_text(json.dumps({**config, "dtype": said}))
        assert MergedModel().weights_dtype(trained.policy) == expected
    base.source = ModelSource(str(tmp_path / "nowhere"), {"gguf_file": "policy.gguf"})
    assert MergedModel().weights_dtype(trained.policy) == "bfloat16"
    base.source = ModelSource("nobody/has-this-model", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert MergedModel().weights_dtype(trained.policy) == "bfloat16", "where the hub cannot be reached"

"""An exported adapter named as the model: its base with the adapter in its weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.export import AdapterFolder, MergedModel, TrainedPolicy, write_policy
from hybrid_lightning.model.loading import load_model, load_tokenizer, resolve_model
from hybrid_lightning.model.pretrained import Pretrained


def load(folder, dtype="float32"):
    return load_model(resolve_model(str(folder)), dtype, None)


def test_it_is_what_the_merged_model_is_in_bfloat16_too(train, tmp_path):
    trained = train(dtype="bfloat16")
    adapter = load(write_policy(trained.policy, AdapterFolder(), tmp_path / "adapter"), "bfloat16")
    merged = load(write_policy(trained.policy, MergedModel(), tmp_path / "merged"), "bfloat16")
    for (name, ours), theirs in zip(adapter.named_parameters(), merged.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16, name
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4, msg=name)  # a rounding


def test_the_tokenizer_is_the_one_of_training(train, tmp_path):
    folder = write_policy(train(chat_template="{{ messages[0].content }}!").policy, AdapterFolder(), tmp_path / "out")
    assert load_tokenizer(resolve_model(str(folder))).chat_template == "{{ messages[0].content }}!"
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(resolve_model(str(folder))).chat_template is None, "the base's, where the adapter has none"


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_does_not_fit_is_refused_with_the_reason(train, tmp_path):
    folder = write_policy(train().policy, AdapterFolder(), tmp_path / "out")
    weights = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in weights if ".lora_B." in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit its base model: it is missing '.*lora_B"):
        load(folder)
    save_file({**weights, "base_model.model.more.lora_A.weight": weights[gone].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"the base has no '.*more\.lora_A"):
        load(folder)


def test_a_base_that_is_not_there_is_named(train, tmp_path):
    folder = write_policy(train().policy, AdapterFolder(), tmp_path / "out")
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    for base, message in (
        (tmp_path / "gone", r"belongs to the model '.*gone', which is not there; correct base_model_name_or_path"),
        (None, "does not name its base model"),
        (gguf, r"which has 0 GGUF files and no config\.json"),
        (train("gpt2").policy.base.model, "cannot put the adapter"),
    ):
        change(folder, base_model_name_or_path=base and str(base))
        with pytest.raises(ModelError, match=message):
            load(folder)
    (gguf / "small.gguf").touch()
    change(folder, base_model_name_or_path=str(gguf))
    source = resolve_model(str(folder))
    assert source.arguments == {"gguf_file": "small.gguf"} and source.adapter == str(folder), "the only one there is"
    change(folder, base_model_name_or_path="owner/name", revision="v1")
    assert resolve_model(str(folder)).arguments == {"revision": "v1"}


def test_an_adapter_trained_from_it_is_not_an_adapter_of_the_base(train, tmp_path):
    trained = train()
    folder = write_policy(trained.policy, AdapterFolder(), tmp_path / "out")
    again = TrainedPolicy(trained.policy.plan, trained.policy.weights, Pretrained(str(folder)))
    with pytest.raises(ConfigError, match="PEFT cannot stack adapters; export form=MergedModel"):
        write_policy(again, AdapterFolder(), tmp_path / "more")

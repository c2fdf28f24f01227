"""Every config is parsed by the real command line and trains for two steps, on a tiny model and rows where it needs others."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from public_data import public_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hybrid_lightning import cli
from hybrid_lightning.data import FileSource
from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

pytestmark = pytest.mark.usefixtures("pictures")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "evaluate")  # which trains nothing
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
_CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking %}#{% endif %}{% endif %}"
)
# A few rows in the columns of the data set that a config names, and what makes the config take them.
_QUESTIONS = [(f"Tom has {n} pens and gets {n + 2} more. How many has he?", 2 * n + 2) for n in range(30)]
_MAWPS_ROWS = [{"input": question, "target": float(answer)} for question, answer in _QUESTIONS]
_GSM8K_ROWS = [{"question": question, "answer": f"He has\n#### {answer}"} for question, answer in _QUESTIONS]
_LEETCODE_ROWS = [
    {
        "query": f"Add {n}.\n```python\nclass Solution:\n    def add(self, x: int) -> int:\n```",
        "prompt": "from typing import *",
        "entry_point": "Solution().add",
        "test": f"def check(candidate):\n    assert candidate(x = 1) == {n + 1}\n",
        "completion": f"class Solution:\n    def add(self, x: int) -> int:\n        return x + {n}\n",
    }
    for n in range(30)
]
STAND_INS = {
    "leetcode_qwen3": (
        _LEETCODE_ROWS,
        [
            "--data.source=FileSource",
            "--data.source.train=rows.jsonl",
            "--data.source.validation_fraction=0.2",
            "--data.source.question_column=query",
            "--data.source.answer_column=completion",
        ],
    ),
    "smollm2_mawps": (_MAWPS_ROWS, ["--data.source.train=rows.jsonl"]),
    "qwen3": (
        [{"question": question, "answer": answer} for question, answer in _QUESTIONS],
        ["--data.source=FileSource", "--data.source.train=rows.jsonl", "--data.source.validation_fraction=0.2"],
    ),
    "gsm8k_qwen3": (
        _GSM8K_ROWS,
        [
            "--data.source=FileSource",
            "--data.source.train=rows.jsonl",
            "--data.source.validation_fraction=0.2",
            r"--data.source.answer_pattern=####\s*(.+)",
        ],
    ),
}


def settings(config):
    """Arguments of the model, whose class is PolicyModule unless the config names another."""
    return config["model"].get("init_args", config["model"])


def small(config):
    """Overrides that make two steps of a few short completions, with a validation, of any config."""
    sizes = ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4"]
    sizes.append(f"--model.minibatches_per_rollout={min(settings(config).get('minibatches_per_rollout', 1), 2)}")
    if "examples_per_step" in settings(config):
        sizes = ["--model.examples_per_step=8"]
    limits = ["--data.validation_prompts=2", "--data.eval_batch_size=2", "--trainer.num_sanity_val_steps=0"]
    if config["data"].get("max_prompt_tokens"):
        limits.append("--data.max_prompt_tokens=2000")  # one token a character
    return [
        *sizes,
        "--model.sampler.max_new_tokens=6",
        "--adapter.calibration_prompts=4",
        "--trainer.max_steps=2",
        f"--trainer.val_check_interval={2 * min(config['trainer'].get('accumulate_grad_batches', 1), 4)}",
        f"--trainer.accumulate_grad_batches={min(config['trainer'].get('accumulate_grad_batches', 1), 4)}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        *limits,
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama with one token per printable character and a chat template that reads `enable_thinking`."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i + 3 for i, c in enumerate(_CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = _CHAT
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=4096, **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hybrid_lightning", *arguments])
    cli.main()


def parse(arguments, monkeypatch):
    """The config as the command line reads it; nothing is built."""
    parsed = []

    def stop(self):
        parsed.append(self.config[self.subcommand])
        raise StopIteration

    monkeypatch.setattr(cli.HybridLightningCLI, "before_instantiate_classes", stop)
    with pytest.raises(StopIteration):
        run(arguments, monkeypatch)
    return parsed[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses_as_it_is(path, here, monkeypatch):
    config = yaml.safe_load(path.read_text())
    parsed = parse(["fit", "--config", str(path)], monkeypatch)
    assert parsed.model.init_args.model == settings(config)["model"]
    assert parsed.model.init_args.lr_lora == settings(config)["lr_lora"]
    assert parsed.trainer.max_steps == config["trainer"]["max_steps"]


def test_an_answer_pattern_that_begins_with_a_hash_is_kept(here, monkeypatch):
    path = ROOT / "configs" / "gsm8k_qwen3.yaml"
    pattern = yaml.safe_load(path.read_text())["data"]["source"]["init_args"]["answer_pattern"]
    parsed = parse(["fit", "--config", str(path)], monkeypatch)
    assert pattern.startswith("####") and parsed.data.init_args.source.init_args.answer_pattern == pattern


def test_null_on_the_command_line_is_no_word(here, monkeypatch):
    path = ROOT / "configs" / "evaluate.yaml"
    options = ["--data.format=PlainFormat", "--data.format.system_prompt=null", "--data.source.test=rows.jsonl"]
    parsed = parse(["test", "--config", str(path), *options, "--data.source.answer_column=null"], monkeypatch)
    assert parsed.data.init_args.format.init_args.system_prompt is None
    assert parsed.data.init_args.source.init_args.answer_column is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_calibration_samples_no_more_at_once_than_a_rollout(path):
    """Which the memory that a config names has room for: those that calibrate are not divided among devices."""
    config = yaml.safe_load(path.read_text())
    if "prompts_per_rollout" in settings(config) and settings(config)["model"] != "embedded":
        assert config["adapter"]["calibration_prompts"] <= settings(config)["prompts_per_rollout"]


@pytest.mark.filterwarnings("ignore:two runs with one seed may differ")  # programs have a time limit
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains(path, tiny, here, monkeypatch):
    config = yaml.safe_load(path.read_text())
    arguments = ["fit", "--config", str(path)]
    if settings(config)["model"] != "embedded":
        arguments.append(f"--model.model={tiny}")
    if path.stem in STAND_INS:
        rows, options = STAND_INS[path.stem]
        (here / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        arguments += options
    run([*arguments, *small(config)], monkeypatch)
    (folder,) = (here / "runs" / path.stem).iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["accuracy_after"] <= 1
    assert summary["full_modules"] and summary["lora_modules"] and (folder / "plan.png").is_file()
    assert summary["loss"] == settings(config)["loss"]["class_path"]
    # The accuracy that picks the best checkpoint is one that is measured.
    assert config["checkpoint"]["monitor"] in summary["validation"]["after"] and config["checkpoint"]["mode"] == "max"
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_rollouts_can_be_split_as_it_says(path):
    config = yaml.safe_load(path.read_text())
    model, accumulate = settings(config), config["trainer"].get("accumulate_grad_batches", 1)
    rows = (
        model["examples_per_step"] if "examples_per_step" in model else model["prompts_per_rollout"] * model["samples_per_prompt"]
    )
    assert rows % (model.get("minibatches_per_rollout", 1) * accumulate) == 0
    assert config["trainer"]["val_check_interval"] % accumulate == 0, "a validation falls between optimizer steps"
    assert config["trainer"]["logger"]["init_args"]["name"] == path.stem


def test_a_config_whose_data_nobody_has_says_how_to_give_it(here, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(ROOT / "configs" / "smollm2_mawps.yaml"), "--model.model=embedded"], monkeypatch)
    assert re.search(r"error: no data: set at least one of train, .*, as in --data\.source\.train=", capsys.readouterr().err)


def test_no_config_names_a_file_outside_of_the_repository():
    texts = {path: path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
    assert not [path for path, text in texts.items() if re.search(r"[:\s]\.\./|shared/", text)]


def test_grpo_and_gspo_differ_in_the_loss_alone():
    gspo, grpo = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("gspo", "grpo"))
    assert gspo["model"].pop("loss") != grpo["model"].pop("loss")
    assert gspo["trainer"]["logger"]["init_args"].pop("name") != grpo["trainer"]["logger"]["init_args"].pop("name")
    assert gspo == grpo


@pytest.fixture(scope="module")
def gsm8k():
    """GSM8K from local files, with the settings of the config's hub source."""
    settings = dict(yaml.safe_load((ROOT / "configs" / "gsm8k_qwen3.yaml").read_text())["data"]["source"]["init_args"])
    for hub in ("path", "name", "train_split", "test_split"):
        del settings[hub]
    return FileSource(public_data("gsm8k/train.jsonl"), test=public_data("gsm8k/test.jsonl"), **settings).load()


def test_every_gsm8k_answer_is_a_number(gsm8k):
    assert len(gsm8k.train) + len(gsm8k.validation) <= 7473 and len(gsm8k.test) == 1319
    assert len(gsm8k.validation) == pytest.approx(0.03 * 7473, abs=3) and len(gsm8k.train) > 7000
    for row in [*gsm8k.train, *gsm8k.validation, *gsm8k.test]:
        assert re.fullmatch(r"-?\d[\d,]*(\.\d+)?", row.answer), row


def test_gsm8k_solutions_earn_the_reward_and_others_do_not(gsm8k):
    rows = gsm8k.test[:12]
    prompts = [Prompt(text=row.question, answer=row.answer) for row in rows]
    solutions = [row.columns["answer"] for row in rows]
    boxed = [rf"So the answer is \boxed{{{row.answer}}}." for row in rows]
    wrong = [rf"So the answer is \boxed{{{int(row.answer.replace(',', '')) + 1}}}." for row in rows]
    reward = MathMatch()
    assert reward(solutions, prompts) == [1.0] * 12
    assert reward(boxed, prompts) == [1.0] * 12
    assert reward(wrong, prompts) == [0.0] * 12

"""Data, reward, monitors and settings are checked before a model is loaded: here its weights cannot be, and say so if asked."""

import shutil

import pytest
from cli_runs import assert_refused, run, write_folder
from tiny_runs import write_model

from hybrid_lightning.data import FileSource, PromptDataModule

EXAMPLES = """
model:
  class_path: {kind}
  init_args: {{model: {folder}/unreadable, examples_per_step: 8}}
data:
  source:
    class_path: FileSource
    init_args: {{train: {folder}/sums.jsonl, answer_column: null, validation_fraction: 0.2}}
  format: {format}
trainer: {{accelerator: cpu, max_steps: 2}}
"""
PARTS = """
from lightning.pytorch import Callback
from hybrid_lightning.data import PromptDataModule


def of_both(prompt, answer, completion):
    return 1.0


def of_a_hint(completion, hint):
    return 1.0


class Logs(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/own", 1.0)


class Prepared(PromptDataModule):
    def prepare_data(self):
        (Path("prepared.jsonl")).write_text(Path("sums.jsonl").read_text())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("checks")):
        shutil.copytree(folder / "model", folder / "unreadable")
        (folder / "unreadable" / "model.safetensors").write_bytes(b"no weights")
        (folder / "my_parts.py").write_text(
            (folder / "my_parts.py").read_text() + PARTS.replace("Path(", "__import__('pathlib').Path(")
        )
        (folder / "words.jsonl").write_text("\n".join(f'{{"question": "{n}", "answer": "an answer"}}' for n in range(40)))
        for name, kind, form in (
            ("sft", "SupervisedModule", "DemonstrationFormat"),
            ("dpo", "PreferenceModule", "PreferenceFormat"),
        ):
            (folder / f"{name}.yaml").write_text(EXAMPLES.format(kind=kind, format=form, folder=folder))
        yield folder


MISTAKES = [
    # data
    ("fit", "data.source.init_args.train=missing.jsonl", r"train='missing\.jsonl' does not exist"),
    ("validate", "data.source.init_args.validation_fraction=0", r"no validation rows, which validate needs"),
    ("fit", "data.format.template={question}{hint}", r"uses \{hint\}, which .* does not have"),
    ("fit", "data.max_prompt_tokens=2", r"all 24 train prompts are longer than max_prompt_tokens=2"),
    ("fit", "model.sampler.max_new_tokens=200", r"a prompt of 4 tokens and max_new_tokens=200 exceed the model's 128"),
    ("fit", "model.prompts_per_rollout=1000", r"prompts_per_rollout=1000 is more than the 24 training prompts"),
    # reward
    (
        "fit",
        "data.source.init_args.train=words.jsonl model.reward=MathMatch",
        r"reference answer 'an answer' .* neither a number",
    ),
    (
        "fit",
        "model.reward=FunctionReward model.reward.function=my_parts.of_a_hint",
        r"needs 'hint', but .* row 0 has no such column",
    ),
    # monitors
    ("fit", "checkpoint.monitor=val/avg@8", r"ModelCheckpoint has monitor=val/avg@8, .* one of val/greedy_accuracy, .*val/avg@2"),
    (
        "fit",
        "trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping trainer.callbacks.monitor=val/loss",
        r"EarlyStopping has monitor=val/loss, which validation does not measure",
    ),
    # settings
    ("fit", "model.dtype=bfloat16", r"needs trainer\.precision=bf16-mixed"),
    ("fit", "trainer.accumulate_grad_batches=5", r"cannot be split evenly into 10 micro-batches"),
    ("fit", "model.loss.kl_coef=0.1 adapter.keep_start_weights=false", r"set adapter\.keep_start_weights=true"),
    (
        "fit",
        "adapter.target_modules=[foo_proj]",
        r"'foo_proj' matches no candidate module: the model has modules named down_proj",
    ),
]


@pytest.mark.parametrize(
    ("command", "options", "message"), MISTAKES, ids=[f"{command} {options}" for command, options, _ in MISTAKES]
)
def test_before_the_model_of_a_policy(folder, command, options, message):
    result = run(
        folder, command, "--config", "t.yaml", "--model.model=unreadable", *(f"--{option}" for option in options.split())
    )
    assert_refused(result, message)
    assert not (folder / "runs").exists(), "nothing has begun"


@pytest.mark.parametrize("command", ["fit", "score", "test"])
def test_with_nothing_wrong_the_weights_are_asked_for(folder, command):
    result = run(folder, command, "--config", "t.yaml", "--model.model=unreadable")
    assert_refused(result, "cannot load the model 'unreadable'")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("sft", "data.format.completion={answer} data.format=PlainFormat", r"has 0 completions, but SupervisedModule needs one"),
        (
            "sft",
            "data.format.completion={answer} checkpoint.monitor=val/avg@8",
            r"monitor=val/avg@8, .* one of val/loss, val/entropy",
        ),
        ("dpo", "data.format.chosen={answer} data.format.rejected={answer}", r"the chosen completion is also the rejected one"),
        (
            "dpo",
            "data.format.chosen={answer} data.format.rejected=-{answer} checkpoint.monitor=val/accuracies",
            r"monitor=val/accuracies, .* val/rewards/accuracies",
        ),
        ("dpo", "data.format.chosen={answer} data.format.rejected=-{answer}", r"cannot load the model"),
    ],
)
def test_before_the_model_of_examples(folder, config, options, message):
    result = run(folder, "fit", "--config", f"{config}.yaml", *(f"--{option}" for option in options.split()))
    assert_refused(result, message)


def test_a_prediction_without_a_reward_is_refused_before_the_model_is_loaded(folder):
    result = run(folder, "predict", "--config", "sft.yaml", "--data.source.init_args.test_fraction=0.2")
    assert_refused(result, r"predict scores completions: give model\.reward")


def test_a_plan_of_another_model_is_refused_before_the_model_is_loaded(folder):
    write_model(folder / "gpt2", "gpt2")
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=planned", "--trainer.logger.name=gpt2"]
    result = run(folder, "score", "--config", "t.yaml", "--model.model=gpt2", *options)
    assert result.code == 0, result.err
    plan = "--adapter.plan=planned/gpt2/version_0/plan.json"
    result = run(folder, "fit", "--config", "t.yaml", "--model.model=unreadable", plan)
    assert_refused(result, r"the plan was made for gpt2 and names \S+; this model has no such module")


def test_what_a_callback_of_ones_own_logs_may_be_monitored(folder):
    options = ["--model.model=unreadable", "--checkpoint.monitor=val/own", "--trainer.logger=false"]
    assert_refused(run(folder, "fit", "--config", "t.yaml", *options), "monitor=val/own, which validation does not measure")
    options = [*options[1:], "--trainer.callbacks+=my_parts.Logs", "--trainer.max_steps=2", "--trainer.default_root_dir=own"]
    result = run(folder, "fit", "--config", "t.yaml", *options)
    assert result.code == 0, result.err
    result = run(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/other")
    assert_refused(result, "monitor=val/other, which validation does not measure")


def test_rows_are_read_and_filtered_once(folder, monkeypatch):
    calls: list[str] = []
    for kind, name in ((FileSource, "read_tables"), (PromptDataModule, "_short_enough")):
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given, _f=original, _n=name: calls.append(f"{_n} {given[:1]}") or _f(self, *given)
        )
    result = run(folder, "score", "--config", "t.yaml", "--trainer.logger=false", "--trainer.default_root_dir=once")
    assert result.code == 0, result.err
    assert {"read_tables ()", "_short_enough ('train',)", "_short_enough ('validation',)"} <= set(calls)
    assert len(calls) == len(set(calls)), "nothing is done twice"


def test_a_data_module_that_prepares_its_files_does_so_first(folder):
    options = ["--data=my_parts.Prepared", "--data.source.init_args.train=prepared.jsonl", "--data.format=PlainFormat"]
    options += ["--trainer.logger=false", "--trainer.default_root_dir=prepared"]
    result = run(folder, "score", "--config", "t.yaml", *options)
    assert result.code == 0, result.err

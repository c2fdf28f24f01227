"""Data, reward, monitors and settings are checked before a model is loaded: here its weights cannot be, and say so if asked."""

import shutil

import pytest
from cli_runs import assert_refused, done, run, write_folder
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
from pathlib import Path

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
        Path("prepared.jsonl").write_text(Path("sums.jsonl").read_text())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("checks")):
        shutil.copytree(folder / "model", folder / "unreadable")
        (folder / "unreadable" / "model.safetensors").write_bytes(b"no weights")
        with (folder / "my_parts.py").open("a") as file:
            file.write(PARTS)
        (folder / "words.jsonl").write_text("\n".join(f'{{"question": "{n}", "answer": "an answer"}}' for n in range(40)))
        kinds = {"sft": ("SupervisedModule", "DemonstrationFormat"), "dpo": ("PreferenceModule", "PreferenceFormat")}
        for name, (kind, form) in kinds.items():
            (folder / f"{name}.yaml").write_text(EXAMPLES.format(kind=kind, format=form, folder=folder))
        yield folder


NO_WEIGHTS = "cannot load the model"
ANSWER, CHOSEN, REJECTED = "data.format.completion={answer}", "data.format.chosen={answer}", "data.format.rejected=-{answer}"
STOPPING = "trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping trainer.callbacks.monitor=val/loss"
# Command, config and options, and what the last line has to say.
MISTAKES = [
    # nothing, so that the weights are asked for
    ("fit t", NO_WEIGHTS),
    ("score t", NO_WEIGHTS),
    ("test t", NO_WEIGHTS),
    (f"fit dpo {CHOSEN} {REJECTED}", NO_WEIGHTS),
    # data
    ("fit t data.source.init_args.train=missing.jsonl", r"train='missing\.jsonl' does not exist"),
    ("validate t data.source.init_args.validation_fraction=0", "no validation rows, which validate needs"),
    ("fit t data.format.template={question}{hint}", r"uses \{hint\}, which .* does not have"),
    ("fit t data.max_prompt_tokens=2", "all 24 train prompts are longer than max_prompt_tokens=2"),
    ("fit t model.sampler.max_new_tokens=200", "a prompt of 4 tokens and max_new_tokens=200 exceed the model's 128"),
    ("fit t model.prompts_per_rollout=1000", "prompts_per_rollout=1000 is more than the 24 training prompts"),
    (f"fit sft {ANSWER} data.format=PlainFormat", "has 0 completions, but SupervisedModule needs one"),
    (f"fit dpo {CHOSEN} data.format.rejected={{answer}}", "the chosen completion is also the rejected one"),
    # reward
    ("fit t data.source.init_args.train=words.jsonl model.reward=MathMatch", "reference answer 'an answer' .* neither a number"),
    (
        "fit t model.reward=FunctionReward model.reward.function=my_parts.of_a_hint",
        "needs 'hint', but .* row 0 has no such column",
    ),
    ("predict sft data.source.init_args.test_fraction=0.2", r"predict scores completions; give model\.reward"),
    # monitors
    ("fit t checkpoint.monitor=val/avg@8", "ModelCheckpoint has monitor=val/avg@8, .* one of val/greedy_accuracy, .*val/avg@2"),
    (f"fit t {STOPPING}", "EarlyStopping has monitor=val/loss, which validation does not measure"),
    (f"fit sft {ANSWER} checkpoint.monitor=val/avg@8", "monitor=val/avg@8, .* one of val/loss, val/entropy"),
    (f"fit dpo {CHOSEN} {REJECTED} checkpoint.monitor=val/accuracies", "monitor=val/accuracies, .* val/rewards/accuracies"),
    # settings
    ("fit t model.dtype=bfloat16", r"needs trainer\.precision=bf16-mixed"),
    ("fit t trainer.accumulate_grad_batches=5", "cannot be split evenly into 10 micro-batches"),
    ("fit t model.loss.kl_coef=0.1 adapter.keep_start_weights=false", r"set adapter\.keep_start_weights=true"),
    ("fit t adapter.target_modules=[foo_proj]", "'foo_proj' matches no candidate module; give one of down_proj"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_found_before_the_model_is_loaded(folder, words, message):
    command, config, *options = words.split()
    given = ["--config", f"{config}.yaml", "--model.model=unreadable", *(f"--{option}" for option in options)]
    assert_refused(run(folder, command, *given), message)
    assert not (folder / "runs").exists(), "nothing has begun"


def test_a_plan_of_another_model_is_refused_before_the_model_is_loaded(folder):
    write_model(folder / "gpt2", "gpt2")
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=planned", "--trainer.logger.name=gpt2"]
    result = done(folder, "score", "--config", "t.yaml", "--model.model=gpt2", *options)
    plan = "--adapter.plan=planned/gpt2/version_0/plan.json"
    result = run(folder, "fit", "--config", "t.yaml", "--model.model=unreadable", plan)
    assert_refused(result, r"the plan was made for gpt2 and names \S+; this model has no such module")


def test_what_a_callback_of_ones_own_logs_may_be_monitored(folder):
    options = ["--trainer.callbacks+=my_parts.Logs", "--trainer.max_steps=2", "--trainer.default_root_dir=own"]
    options.append("--trainer.logger=false")
    result = done(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/own")
    result = run(folder, "fit", "--config", "t.yaml", *options, "--checkpoint.monitor=val/other")
    assert_refused(result, "monitor=val/other, which validation does not measure")


def test_rows_are_read_and_filtered_once(folder, monkeypatch):
    calls: list[str] = []
    for kind, name in ((FileSource, "read_tables"), (PromptDataModule, "_short_enough")):
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given, _f=original, _n=name: calls.append(f"{_n} {given[:1]}") or _f(self, *given)
        )
    done(folder, "score", "--config", "t.yaml", "--trainer.logger=false", "--trainer.default_root_dir=once")
    assert {"read_tables ()", "_short_enough ('train',)", "_short_enough ('validation',)"} <= set(calls)
    assert len(calls) == len(set(calls)), "nothing is done twice"


def test_a_data_module_that_prepares_its_files_does_so_first(folder):
    options = ["--data=my_parts.Prepared", "--data.source.init_args.train=prepared.jsonl", "--data.format=PlainFormat"]
    options += ["--trainer.logger=false", "--trainer.default_root_dir=prepared"]
    done(folder, "score", "--config", "t.yaml", *options)
    assert (folder / "prepared.jsonl").is_file() and list((folder / "prepared").rglob("plan.json"))

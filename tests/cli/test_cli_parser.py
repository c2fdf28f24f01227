"""A mistake on the command line or in a config: the message suggests what was meant, and comes soon."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import assert_refused, run
from jsonargparse import ArgumentParser

from hybrid_lightning.cli.remedies import TRL_NAMES

ROOT = Path(__file__).parents[2]


# Command, the text of its config, and the last line.
MISTAKES = [
    # of the command, of a class of the config, of one inside of that, of one on the command line
    ("fit --config t.yaml --trainer.max_step=3", {}, r"--trainer\.max_step=3; did you mean --trainer\.max_steps\?$"),
    ("fit --config t.yaml --model.lr_lorra=1", {}, r"PolicyModule has no option lr_lorra; did you mean --model\.lr_lora\?$"),
    ("fit --model.loss=SAPOLoss --model.loss.clip_low=1", {}, r"SAPOLoss has no option clip_low; --model\.loss\.help=SAPOLoss "),
    # the key in front is wrong, or missing
    ("fit --modle.loss.clip_low=1", {}, r"did you mean --model\.loss\.clip_low\?$"),
    ("fit --temprature=3", {}, r"did you mean --model\.sampler\.temperature\?$"),
    ("fit --wholly_unknown=3", {}, r"--wholly_unknown=3; python -m hybrid_lightning fit --help lists all options$"),
    ("fit t.yaml", {}, r"unrecognized arguments: t\.yaml; a config is given as --config t\.yaml$"),
    # TRL's names
    ("fit --config t.yaml --model.num_generations=4", {}, r"TRL's num_generations is --model\.samples_per_prompt here"),
    # classes
    ("fit --config t.yaml --trainer.callbacks=PolicyExpor", {}, r"trainer\.callbacks: unknown class .* mean PolicyExport\?$"),
    ("fit --config t.yaml --model.sampler=Zzz", {}, r"sampler: unknown class Zzz; give one of Sampler.*, or module\.Class$"),
    ("fit --model.optimizer=torch.optim.AdamWW", {}, r"has no attribute 'AdamWW'.*; did you mean torch\.optim\.AdamW\?$"),
    ("fit --model.loss.clip_low=1", {}, r"loss: no PolicyLoss is named yet; name it first, one of BNPOLoss, CISPOLoss"),
    # commands
    ("fitt --config t.yaml", {}, r"invalid choice: 'fitt' \(choose from .*\); did you mean fit\?$"),
    # keys of a config
    ("fit --config t.yaml", {"model": {"lr_lorra": 1}}, r"o\.yaml: model\.lr_lorra: PolicyModule has no .* --model\.lr_lora\?$"),
    (
        "fit --config t.yaml",
        {"model": {"reward": {"class_path": "WeightedSum", "init_args": {"rewards": [{"class_path": "ExactMatc"}]}}}},
        r"rewards: unknown class ExactMatc; did you mean ExactMatch\?$",
    ),
]


@pytest.mark.parametrize(
    ("command", "config", "message"), MISTAKES, ids=[f"{command} {config}" for command, config, _ in MISTAKES]
)
def test_what_was_meant_is_said(folder, command, config, message):
    (folder / "o.yaml").write_text(yaml.safe_dump(config))
    result = run(folder, *command.split(), *(["--config=o.yaml"] if config else []))
    assert_refused(result, message)
    assert result.code == 2 and "usage" not in result.err


# An option or a config, and what is said of a class that cannot be imported.
UNIMPORTABLE = [
    (
        "--model.reward=nowhere.Mine",
        r"--model\.reward: cannot import nowhere\.Mine: No module named 'nowhere'; nowhere\.py is neither in {here}\b.* nor in "
        r"an installed package; correct the name, or start in the folder of that file$",
    ),
    ("--data=nowhere.Mine", r"--data: cannot import nowhere\.Mine: No module named 'nowhere'; nowhere\.py is neither in {here}"),
    (
        "--model.loss=divides.Mine",
        r"--model\.loss: cannot import divides\.Mine: importing {here}/divides\.py raised ZeroDivisionError: division by zero "
        r"\(divides\.py line 2\)$",
    ),
    (
        "--model.reward=needs.Mine",
        r"importing {here}/needs\.py raised ModuleNotFoundError: No module named 'no_such_module' \(needs\.py line 1\)$",
    ),
    (
        "--model.reward=my_parts.StartWithDigit",
        r"{here}/my_parts\.py: module 'my_parts' has no attribute 'StartWithDigit'; did you mean my_parts\.StartsWithDigit\?$",
    ),
    (
        {"model": {"reward": {"class_path": "divides.Mine", "init_args": {"scale": 1}}}},
        r"o\.yaml: model\.reward: cannot import divides\.Mine: importing {here}/divides\.py raised ZeroDivisionError",
    ),
    (
        {"trainer": {"callbacks": [{"class_path": "nowhere.Mine"}]}},
        r"o\.yaml: trainer\.callbacks: cannot import nowhere\.Mine: No module named 'nowhere'; nowhere\.py is neither in {here}",
    ),
]


@pytest.mark.parametrize(("given", "message"), UNIMPORTABLE, ids=[str(given) for given, _ in UNIMPORTABLE])
def test_a_class_that_cannot_be_imported_is_refused_with_the_imports_own_message(folder, given, message):
    (folder / "divides.py").write_text('"""Divides."""\n1 / 0\n')
    (folder / "needs.py").write_text("import no_such_module\n")
    (folder / "o.yaml").write_text(yaml.safe_dump(given))
    result = run(folder, "fit", "--config", "t.yaml", given if isinstance(given, str) else "--config=o.yaml")
    assert_refused(result, message.format(here=folder))
    assert result.code == 2 and "NoneType" not in result.err


# Packages that take long to import; neither a help nor an error needs them.
HEAVY = {"peft", "bitsandbytes", "datasets", "math_verify", "reasoning_gym", "trl", "hybrid_lightning.adapters.apply"}
PROGRAM = f"""
import sys
from hybrid_lightning.cli.main import main
for command in ("{ROOT / "configs"}/gspo.yaml --help", "{ROOT / "configs"}/qwen3.yaml --model.lr_lorra=1"):
    sys.argv = ["hybrid_lightning", "fit", "--config", *command.split()]
    try:
        main()
    except SystemExit:
        print({HEAVY} & sys.modules.keys())
"""


@pytest.mark.long
def test_a_help_and_a_mistake_import_nothing_that_takes_long(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--model.lr_lora\n" in done.stdout and "did you mean --model.lr_lora" in done.stderr
    assert done.stdout.count("set()\n") == 2, done.stdout[-500:]


def test_parsers_of_others_read_yaml_as_before():
    other = ArgumentParser()
    other.add_argument("--value", type=str | None)
    assert [other.parse_args([f"--value={text}"]).value for text in ("None", "null", "x")] == ["None", None, "x"]


def test_the_printed_config_has_all_options_and_keeps_texts(folder, tmp_path):
    """Also those that are TRL's by another name; texts of few-shot examples are not read as YAML a second time."""
    rows = [{"question": "Reverse these words: cat door", "answer": "95", "choices": ["a: b", 3, None]}]
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"data": {"format": {"init_args": {"few_shot": rows}}}}))
    printed = yaml.safe_load(run(folder, "fit", "--config", "t.yaml", "--config", tmp_path / "rows.yaml", "--print_config").out)
    assert printed["data"]["init_args"]["format"]["init_args"]["few_shot"] == rows
    assert printed["model"]["class_path"] == "hybrid_lightning.training.PolicyModule", "the room and not the file or the package"
    assert printed["model"]["init_args"]["loss"]["class_path"] == "hybrid_lightning.losses.GRPOLoss"
    for theirs, ours in TRL_NAMES.items():
        found = printed
        for key in ours.split("."):
            found = found.get("init_args", found)
            assert key in found, f"{theirs} is not {ours}"
            found = found[key] if isinstance(found[key], dict) else {}

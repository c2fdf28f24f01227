"""Help: the options of the classes that a config names, complete, in an order in which they are found."""

import inspect
import re

import pytest
import yaml
from cli_runs import done, run
from lightning.pytorch import Callback

from hybrid_lightning import adapters, advantages, data, export, losses, model, rewards, rollout, training
from hybrid_lightning.cli.parser import known_classes
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training import LanguageModule


def said(folder, *arguments):
    return done(folder, *arguments).out


def titles(text):
    return re.findall(r"^(\S.*):$", text, re.MULTILINE)


def value_of(text, option):
    """The text in brackets after an option."""
    found = re.search(rf"^  --{re.escape(option)}\n(?:        .*\n)+", text, re.MULTILINE)
    assert found, f"{option} is missing"
    return re.search(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)\s*$", " ".join(found[0].split()))[1]


def test_help_shows_the_default_classes_and_the_trainer_last(folder):
    text = said(folder, "plan", "--help")
    assert text.startswith("usage: python -m hybrid_lightning plan [")
    wanted = ["plan", "model (PolicyModule)", "model.sampler (Sampler)", "data", "adapter", "adapter.budget (ModuleBudget)"]
    *found, last, logger = titles(text)
    assert [title for title in found if title in wanted] == wanted
    assert (last, logger) == ("trainer", "trainer.logger (TensorBoardLogger)")
    assert "default: 0.0001" in value_of(text, "model.lr_lora") and "--adapter.calibration_prompts" in text
    assert all(f"  --trainer.{name}\n" in text for name in inspect.signature(Trainer).parameters if name != "self")
    assert "--prompt_tokens" in text and "Defaults to ``None``" not in text
    # jsonargparse's options for help, and a class's options after the option for the class
    assert not re.search(r"^  --\S+\.help$", text, re.MULTILINE) and text.index("  --model.loss\n") > text.index("  --model\n")


def test_help_shows_the_classes_that_the_config_names(folder):
    text = said(folder, "fit", "-h", "--config=t.yaml")
    assert {"model.loss (GRPOLoss)", "model.reward (StartsWithDigit)", "data.source (FileSource)"} <= set(titles(text))
    assert value_of(text, "model.loss.clip_high") == "float; default: 0.2; now: 0.25"
    assert value_of(text, "model.lr_lora") == "float; default: 0.0001; now: 0.01"
    names = "BNPOLoss, CISPOLoss, DAPOLoss, DPPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, GSPOTokenLoss, SAPOLoss, TokenClippedLoss"
    assert value_of(text, "model.loss").startswith(f"required; one of {names}")
    assert value_of(text, "model.loss").endswith("; now: GRPOLoss")
    modules = value_of(text, "model").removeprefix("one of ").partition(";")[0].split(", ")
    assert {"PolicyModule", "PreferenceModule", "SupervisedModule"} <= set(modules), "beside those that other tests have made"


def test_help_follows_the_command_line(folder):
    rewards = "[{class_path: ExactMatch}, {class_path: FormatReward, init_args: {pattern: a}}]"
    options = ["--model.loss=GSPOLoss", "--model.reward=WeightedSum", f"--model.reward.rewards={rewards}"]
    text = said(folder, "fit", "--help", *options)
    assert {"model.loss (GSPOLoss)", "model.reward.rewards[1] (FormatReward)"} <= set(titles(text))
    assert "  model.reward.rewards[1].pattern\n" in text, "no option of the command line"
    text = said(folder, "fit", "--model=SupervisedModule", "--help")
    assert "model (SupervisedModule)" in titles(text) and "--model.samples_per_prompt" not in text


def test_help_on_the_class_of_the_config_or_the_default(folder):
    text = said(folder, "fit", "--config", "t.yaml", "--model.loss.help")
    assert "--model.loss=GRPOLoss" in text and "now: 0.25" in text and "GSPOLoss: Clipped surrogate" in text
    assert "--model.lr_lora" in said(folder, "fit", "--model.help")
    assert "Disabled by default" in said(folder, "fit", "--trainer.help")
    assert "(see\n`callbacks/resume.py`)" in said(folder, "score", "--adapter.help")
    text = said(folder, "fit", "--model.correction.help")
    assert "no class is chosen for --model.correction" in text and "TokenTruncation: The ratio of each token" in text


def test_help_on_a_function_of_ones_own_is_complete(folder):
    text = said(folder, "fit", "--model.reward.help", "FunctionReward", "--config", "t.yaml")
    assert "    def brevity(completions, **columns): return" in text
    example = yaml.safe_load(re.search(r"In a config:\n\n((?:    .*\n)+)", text)[1])
    assert example == {"model": {"reward": {"class_path": "FunctionReward", "init_args": {"function": "..."}}}}


def test_help_on_classes_of_others(folder):
    text = said(folder, "fit", "--model.reward.help=my_parts.StartsWithDigit")
    assert value_of(text, "model.reward.bonus") == "float; default: 0.0" and "Not described. (float" in text
    text = said(folder, "fit", "--model.optimizer.help=AdamW")
    assert "--model.optimizer.weight_decay" in text and "--model.optimizer.params" not in text and "math::" not in text
    assert "--trainer.callbacks.every_n_steps" in said(folder, "fit", "--trainer.callbacks.help=PolicyExport")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.los.help", r"there is no class model\.los; did you mean --model\.loss\.help\?"),
        ("--model.loss.help=GRPOLos", r"unknown class GRPOLos; did you mean --model\.loss\.help=GRPOLoss\?"),
        ("--model.quantization.help=Zzz", r"unknown class Zzz; give one of NF4, or module\.Class"),
    ],
)
def test_a_mistake_in_a_call_for_help_is_said(folder, option, message):
    result = run(folder, "fit", *option.split())
    assert result.code == 2 and re.search(message, result.last) and "Traceback" not in result.err, result.err


def test_help_without_a_command_tells_each_in_a_whole_sentence(folder):
    text = said(folder, "--help")
    assert "Hybrid-LoRA" in text and "--adapter" not in text
    told = re.split(r"^    (?=[a-z])", text.partition("its options.")[2], flags=re.MULTILINE)[1:]
    sentences = [" ".join(command.split()) for command in told]
    assert len(sentences) == 11 and all(re.fullmatch(r"[a-z]+ [A-Z].*[a-z]\.", sentence) for sentence in sentences), sentences


def test_each_class_that_is_not_a_base_is_found_by_its_short_name():
    bases = (Configurable, LanguageModule, Callback)
    known = {name: part for base in bases for name, part in known_classes(base).items()}
    rooms = (adapters, advantages, data, export, losses, model, rewards, rollout, training)
    offered = {name: getattr(room, name) for room in rooms for name in room.__all__}
    classes = {name: part for name, part in offered.items() if isinstance(part, type) and issubclass(part, bases)}
    found = {name for name, part in classes.items() if not inspect.isabstract(part)}
    assert {"GSPOLoss", "MathMatch", "GSM8K", "ExactGradients", "GroupAdvantage", "MergedModel", "Sampler"} <= found
    assert not [name for name, part in classes.items() if known.get(name) is not (part if name in found else None)]

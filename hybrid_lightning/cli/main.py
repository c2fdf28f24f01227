"""The command line: LightningCLI with more commands: `score`, `export`, `plan`, `doctor`, `compare`, `configs` and `explain`.

This file defines the commands: their options and defaults, the callbacks that they add, and the checks before a model is loaded.
`cli_parser.py` reads arguments and configs and reports mistakes in them, `cli_help.py` writes the help, and `remedies.py` adds
remedies to error messages of other libraries.
"""

import argparse
import gc
import inspect
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import hybrid_lightning.adapters.scorers
import hybrid_lightning.adapters.sketch
import hybrid_lightning.advantages
import hybrid_lightning.export
import hybrid_lightning.losses
import hybrid_lightning.rollout.vllm.in_process
import hybrid_lightning.rollout.vllm.servers
import hybrid_lightning.training.server_teacher  # noqa: F401  (imported so that classes are found by their short names)
from hybrid_lightning.callbacks import (
    HybridAdapterSetup,
    ModelCheckpoint,
    PredictionWriter,
    RewardDivergence,
    RolloutSamples,
    StepTimer,
)
from hybrid_lightning.callbacks.compare_runs import compare
from hybrid_lightning.callbacks.display import say, show_markdown
from hybrid_lightning.callbacks.loggers import NamingMLFlowLogger, log_config
from hybrid_lightning.callbacks.run_folder import check_run_folder, run_folder
from hybrid_lightning.cli.help import ShowHelp, first_sentence, help_asked_last
from hybrid_lightning.cli.parser import Parser, cause_of, is_ours, print_error, unwrapped
from hybrid_lightning.cli.remedies import check_whole_configs, with_remedy
from hybrid_lightning.cli.shipped_configs import config_list, read_config, with_paths
from hybrid_lightning.cli.switches import describe
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory import TrainerFlags
from hybrid_lightning.sharding.fsdp2 import chosen_strategy
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.shared.explain import explanation
from hybrid_lightning.shared.lazy import load_names
from hybrid_lightning.shared.quiet import quiet_libraries
from hybrid_lightning.shared.stopping import StopSignals
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.trainer import CHECKPOINT_DEFAULTS, LOGGER_DEFAULTS, TRAINER_DEFAULTS, Trainer, run_callbacks
from hybrid_lightning.training.example_module import (
    PreferenceModule,  # noqa: F401  (as above)
    SupervisedModule,  # noqa: F401  (as above)
)
from hybrid_lightning.training.module import LanguageModule

for _room in ("agents", "data", "environments", "rewards"):  # as above
    load_names(f"hybrid_lightning.{_room}")

_PACKAGE = Path(__file__).parents[1]
_CALLBACKS = (_PACKAGE / "callbacks").resolve()  # a link in a source tree
_LIGHTNINGS_FORMAT = warnings.formatwarning

# Arguments of the Trainer's methods. They belong to one command, and are not saved in the run's config.
_METHOD_ARGUMENTS = (
    *("ckpt_path", "weights_only", "verbose", "return_predictions"),
    *("form", "folder", "push_to"),
    *("prompt_tokens", "device_gib"),
)
# Flags for commands that need no device. An export reads in one process what any number of processes wrote; a plan may be for
# devices that this machine does not have.
_TRAINER_WITHOUT_DEVICE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "logger": False,
}
_WITHOUT_TRAINER = ("compare", "configs", "explain")
# Descriptions of Lightning's commands; the others have their docstrings.
_DESCRIPTIONS = {
    "fit": "Score the modules, adapt the model and train it.",
    "validate": "Measure a policy on the validation prompts.",
    "test": "Measure a policy on the test prompts.",
    "predict": "Complete the test prompts, and write the completions and rewards to a file.",
}


def _program() -> str:
    """The command's name, as it was started."""
    return "hybrid-lightning" if Path(sys.argv[0]).name.startswith("hybrid-lightning") else "python -m hybrid_lightning"


def _format_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Format a warning of this package as one line without its place in the code, and all others as Lightning does."""
    if Path(filename).is_relative_to(_PACKAGE) or Path(filename).resolve().is_relative_to(_CALLBACKS):
        return f"Warning: {message}\n"
    return _LIGHTNINGS_FORMAT(message, category, filename, lineno, line)


def _freeze() -> None:
    """Let garbage collections skip the objects that exist now: libraries, the policy and the parts of a run stay alive.

    Without it, collections take a tenth of the time of a small run.
    """
    gc.collect()
    gc.freeze()


def main(signals: StopSignals | None = None) -> None:
    """Run the command line. A user's mistake is reported in the last line, without a traceback.

    Args:
        signals: Signal handlers of this process; None installs them only when the command trains, validates, tests or predicts.
    """
    quiet_libraries()
    warnings.formatwarning = _format_warning
    signals = signals or StopSignals()
    try:
        sys.argv[1:] = with_paths(sys.argv[1:])
        HybridLightningCLI(signals)
    except Exception as error:
        cause = cause_of(error)
        if cause is None and not signals.requested:
            if getattr(error, "explained", False):  # another rank has died, which was already printed
                sys.exit(1)
            raise unwrapped(error)  # noqa: B904  (an unexpected error, which needs the traceback of the original exception)
        print_error(with_remedy(str(cause or error)))
        for note in getattr(error, "__notes__", ()):
            say(note)
        signals.check()  # a signal may be the cause: another rank has ended, or a library gave up
        sys.exit(1)


class HybridLightningCLI(LightningCLI):
    """`python -m hybrid_lightning <command> --config ...`."""

    def __init__(self, signals: StopSignals | None = None, **kwargs: Any) -> None:
        self._signals = signals or StopSignals()
        arguments = kwargs.get("args") or sys.argv[1:]
        # Building the options of a command is slow, so only the given command's options are built.
        self._made = set(self.subcommands())
        if isinstance(arguments, list):
            check_whole_configs(arguments)
            self._made &= set(arguments)
        super().__init__(
            LanguageModule,
            PromptDataModule,
            save_config_callback=SaveRunConfig,
            trainer_class=Trainer,
            seed_everything_default=0,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": _program(),
                "description": "Post-training of language models with verifiable rewards, by Hybrid-LoRA. Start with: "
                f"{_program()} fit --config gspo",
            },
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name of each command (a method of the Trainer) -> its arguments that come from the config."""
        given = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "score": given, "export": given, "plan": {*given, "flags", "fit"}, "doctor": given}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a group of options for each configurable callback, and set defaults."""
        parser.add_lightning_class_args(HybridAdapterSetup, "adapter")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutSamples, "samples")
        parser.add_lightning_class_args(RewardDivergence, "divergence")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "model": {
                    "class_path": "hybrid_lightning.training.PolicyModule",
                    "init_args": {
                        "sampler": {"class_path": "hybrid_lightning.rollout.Sampler"},
                        "advantage": {"class_path": "hybrid_lightning.advantages.GroupAdvantage"},
                        "schedule": {"class_path": "hybrid_lightning.training.ConstantSchedule"},
                    },
                },
                "data": {"class_path": "hybrid_lightning.data.PromptDataModule"},
                "adapter.budget": {"class_path": "hybrid_lightning.adapters.ModuleBudget"},
                "adapter.scorer": {"class_path": "hybrid_lightning.adapters.PreconditionedTail"},
                "adapter.gradients": {"class_path": "hybrid_lightning.adapters.ExactGradients"},
                **{f"checkpoint.{name}": value for name, value in CHECKPOINT_DEFAULTS.items()},
                **{f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()},
                "trainer.logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": LOGGER_DEFAULTS},
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that have no options."""
        config = self._get(self.config_init, "trainer")
        config["strategy"] = chosen_strategy(config["strategy"])
        if self.subcommand == "plan":
            self._flags = TrainerFlags.of(config, self._get(self.config_init, "device_gib"))
        if self.subcommand in ("export", "plan"):
            for name, value in _TRAINER_WITHOUT_DEVICE.items():
                config[name] = value
        if self.subcommand == "doctor":
            config["logger"] = False
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        fixed = run_callbacks(self._signals, logged=bool(config["logger"] and not config["fast_dev_run"]))
        try:
            frozen = LambdaCallback(on_train_start=lambda *_: _freeze())
            trainer = super().instantiate_trainer(callbacks=[*fixed, *given, frozen], **kwargs)
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:  # from Lightning's checks of its flags
            raise ConfigError(with_remedy(f"trainer: {error}")) from error
        assert isinstance(trainer, Trainer)
        # The config is saved before the modules are scored, because scoring may take an hour, and may be stopped.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, (StepTimer, SaveRunConfig)))  # type: ignore[attr-defined]
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Handle --help after all other arguments, which decide which classes the help describes."""
        given = sys.argv[1:] if args is None else args
        asked = help_asked_last(given) if isinstance(given, list) and self._made else given
        if asked == given:
            super().parse_arguments(parser, args)
        else:
            parser.parse_args(asked)

    def _set_seed(self) -> None:
        if self.subcommand not in _WITHOUT_TRAINER:
            super()._set_seed()

    @rank_zero_only
    def _say_switched(self) -> None:
        """Print which options classes keep of the classes before them."""
        assert isinstance(self.parser, Parser)
        if self.parser.switched:
            config, defaults = self.config[self.subcommand], self._parser(self.subcommand).get_defaults(skip_validation=True)
            sys.stderr.writelines(f"{line}\n" for line in describe(self.parser.switched, config.as_dict(), defaults.as_dict()))

    def before_instantiate_classes(self) -> None:
        """Say what may surprise in the config, and run the commands that need no objects."""
        self._say_switched()
        if self.subcommand == "compare":
            compare(self.config["compare"]["folders"], self.config["compare"]["html"])
        if self.subcommand == "configs":
            name = self.config["configs"]["name"]
            sys.stdout.write(f"{config_list()}\n" if name is None else read_config(name))
        if self.subcommand == "explain":
            show_markdown(explanation(self.config["explain"]["name"]))
        if self.subcommand in _WITHOUT_TRAINER:
            sys.exit()

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Describe each command in a whole sentence; Lightning would use the first line of its docstring."""
        docs = {name: first_sentence(inspect.getdoc(getattr(Trainer, name))) for name in self.subcommands()}
        said = {**docs, **_DESCRIPTIONS}
        super()._add_subcommands(parser, **{name: {**kwargs.get(name, {}), "description": text} for name, text in said.items()})
        commands: Any = parser._subcommands_action
        for choice in commands._choices_actions:
            choice.help = said[choice.dest]
        for action in parser._actions:  # a config belongs to a command
            action.help = argparse.SUPPRESS if action.dest in ("config", "print_config") else action.help
        parser.usage = f"{_program()} COMMAND [--config NAME ...] [--OPTION=VALUE ...]"
        group: Any = parser._subparsers
        group.title, group.description = "commands", None
        commands.metavar, commands.help = "COMMAND", "COMMAND --help shows its options."
        text = first_sentence(compare.__doc__)
        of_runs = Parser(description=text)
        of_runs.add_argument(
            "folders", metavar="RUN", nargs="*", help="Folder of a run, such as runs/gspo/version_0; at least two."
        )
        of_runs.add_argument("--html", metavar="FILE", help="New file for the comparison as a page, with charts of the curves.")
        parser._subcommands_action.add_subcommand("compare", of_runs, help=text)  # type: ignore[union-attr]
        text = "List the configs that come with the package, or print one as a start for your own."
        of_configs = Parser(description=text)
        of_configs.add_argument("name", metavar="NAME", nargs="?", help="Config to print, such as gspo or loss/dapo.")
        parser._subcommands_action.add_subcommand("configs", of_configs, help=text)  # type: ignore[union-attr]
        text = "Print what to do when something is wrong, or the section on it that a message names."
        of_sections = Parser(description=text)
        of_sections.add_argument("name", metavar="NAME", nargs="?", help="Section to print, such as out-of-memory.")
        parser._subcommands_action.add_subcommand("explain", of_sections, help=text)  # type: ignore[union-attr]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in self._made:
            return self.init_parser(**kwargs)  # no options, only a name among the choices
        parser = super()._prepare_subcommand_parser(klass, subcommand, add_help=False, **kwargs)
        parser.add_argument("-h", "--help", action=ShowHelp)
        if subcommand == "plan":
            parser.add_argument("--fit", action="store_true", help="Find the fewest changes that make the run fit.")
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # no table by Lightning: EvaluationReport shows the same
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        """Check folders, data, reward and settings before loading the model, which takes longest.

        An export reads the weights itself, in the dtype that it needs, and a plan needs no weights.
        """
        assert isinstance(self.trainer, Trainer)
        if subcommand not in ("plan", "doctor"):
            self.trainer.check_checkpoint(self._get(self.config_init, "ckpt_path"))
        if subcommand not in ("export", "plan"):
            if subcommand != "doctor":
                check_run_folder(self.trainer)
            if isinstance(self.model, LanguageModule):
                self.trainer.check(self.model, self.datamodule, subcommand)
            self.model.policy.load()
        _freeze()
        gc.enable()
        super()._run_subcommand(subcommand)

    def _add_instantiators(self) -> None:
        """Replace Lightning's MLflow logger with ours."""
        super()._add_instantiators()
        self.parser.add_instantiator(_mlflow_logger, MLFlowLogger)
        self.parser.add_instantiator(_made, Configurable, subclasses=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "plan":
            return {**arguments, "flags": self._flags, "fit": self._get(self.config_init, "fit")}
        return arguments

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently let a checkpoint's arguments override the command line."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved config without the command's own arguments, so that every command can read it."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        for name in _METHOD_ARGUMENTS:
            config.pop(name, None)
        super().__init__(parser, config, **kwargs)

    def save_config(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Pass the saved config to the loggers. Lightning calls this after it has written the file."""
        folder = run_folder(trainer)
        if folder is not None:
            log_config(trainer, folder / self.config_filename)


def _made(kind: type[Configurable], *given: Any, applied_instantiation_links: Any, **named: Any) -> Any:
    """An object of a class, possibly the user's."""
    with nullcontext() if is_ours(kind) else in_user_code(kind, "__init__"):
        return kind(*given, **named)


def _mlflow_logger(logger: type, *given: Any, applied_instantiation_links: Any, **named: Any) -> Any:
    return (NamingMLFlowLogger if logger is MLFlowLogger else logger)(*given, **named)

"""The command line: LightningCLI with `fit`, `validate`, `test`, `predict`, `score`, `export` and `plan`."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import huggingface_hub
import jsonargparse
import transformers
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, _InstantiatorFn
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import hybrid_lightning.adapters.scorers
import hybrid_lightning.adapters.sketch
import hybrid_lightning.advantages
import hybrid_lightning.data
import hybrid_lightning.export
import hybrid_lightning.losses
import hybrid_lightning.rewards  # noqa: F401  (a class is found by its short name once its module is imported)
from hybrid_lightning.callbacks import (
    EvaluationReport,
    GracefulStop,
    HybridAdapterSetup,
    PredictionWriter,
    RewardDivergence,
    RolloutProgress,
    RolloutSamples,
    RunSummary,
    StepTimer,
    TensorBoardOverview,
)
from hybrid_lightning.callbacks.loggers import NamingMLFlowLogger, log_config
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.errors import ConfigError, HybridLightningError
from hybrid_lightning.memory.from_config import TrainerFlags, policy_arguments
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.policy.preference import PreferenceModule  # noqa: F401  (as above)
from hybrid_lightning.policy.stepped import SteppedModule
from hybrid_lightning.policy.supervised import SupervisedModule  # noqa: F401  (as above)
from hybrid_lightning.stopping import StopSignals
from hybrid_lightning.trainer import Trainer

# Arguments of the Trainer's methods, which belong to one command and not to the run's config.
_METHOD_ARGUMENTS = ("ckpt_path", "weights_only", "verbose", "return_predictions", "form", "folder", "prompt_tokens")

# An export needs no device: one process reads what any number of them wrote. Nor does a plan, for devices that may not be here.
_TRAINER_WITHOUT_DEVICE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "logger": False,
}


# What jsonargparse says -> what a reader of one line can use.
_REWRITES = (
    (r"Does not validate against any of the Union subtypes\s+Subtypes: \[.*?\]\s+Errors:", ""),
    (r"-\s+Expected a path but \S+ either not accessible or invalid\s+", ""),
    (r"Expected a dot import path string: (\S+).*", r"unknown class \1; give module.Class, or a class of ours"),
    (r"\s*- Expected a <class 'NoneType'>", ""),
    (r"\s*Given value type:.*?Given value: (.*)", r"; got \1"),
    (r"Expected a <class '([\w.]+)'>", r"expected \1"),
    (r"- Expected a typing\.Literal\[(.*?)\]", r"or one of \1"),
    (
        r"Expected an instantiatable class, but \S*?(\w+) is abstract; got NestedArg\(key='(\w+)'.*",
        r"before its argument \2 say which \1, as in --form MergedModel --form.dtype=float32",
    ),
    (r"^Unexpected config:\s*$", "a config must be a mapping such as 'trainer: {max_steps: 10}', but is empty"),
    (r"^Unexpected config:\s*", "a config must be a mapping such as 'trainer: {max_steps: 10}', but is: "),
    (r'(Parser key "\S+":)\s*(?:-\s+)+', r"\1 "),
    (r"(Option '\S+' is not accepted)\s*$", r"\1; --KEY.help=CLASS lists those of a class, as in --model.reward.help=ExactMatch"),
    (
        r"(?:Import path (\S+) does not correspond to a subclass of RewardFunction|Unexpected import path format: (\S+\.py:\w+))",
        r"\1\2 is no class derived from RewardFunction; a function is given by class_path FunctionReward with function: \1\2",
    ),
)


_load_yaml = jsonargparse.get_loader("yaml")


def _load_value(text: str) -> Any:
    """YAML, except for two texts that jsonargparse would read otherwise than they are meant.

    It reads the strings of a config as YAML once more, and would turn `answer_pattern: '####\\s*(.+)'`, for YAML a comment alone,
    into null. And it hands a null for an argument of a part on as Python writes it: `--data.format.system_prompt=null` would put
    the word None in front of every prompt.
    """
    value = _load_yaml(text)
    if text == "None":
        return None
    return text if value is None and text.lstrip().startswith("#") else value


jsonargparse.set_loader("yaml", _load_value, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Refuses abbreviated options, and ends every error with one line that says what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would take --trainer.max_epoch=3 silently for max_epochs.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with 2."""
        cause = _cause(ex)
        _print_error(_readable(message) if cause is None else str(cause))
        sys.exit(2)


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved config without the arguments of the command, so that every command can read it back."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        for name in _METHOD_ARGUMENTS:
            config.pop(name, None)
        super().__init__(parser, config, **kwargs)

    def save_config(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loggers the file that has just been written."""
        folder = run_folder(trainer)
        if folder is not None:
            log_config(trainer, folder / self.config_filename)


class HybridLightningCLI(LightningCLI):
    """`python -m hybrid_lightning <command> --config ...`."""

    def __init__(self, signals: StopSignals | None = None, **kwargs: Any) -> None:
        self._signals = signals or StopSignals()
        arguments = kwargs.get("args") or sys.argv[1:]
        # The command, where it comes first, as it nearly always does.
        self._asked = arguments[0] if isinstance(arguments, list) and arguments else None
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
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, each a method of the Trainer, with the arguments that come from the config."""
        given = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "score": given, "export": given, "plan": {*given, "flags"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback a group of options of its own."""
        parser.add_lightning_class_args(HybridAdapterSetup, "adapter")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutSamples, "samples")
        parser.add_lightning_class_args(RewardDivergence, "divergence")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "model": {
                    "class_path": "hybrid_lightning.policy.module.PolicyModule",
                    "init_args": {
                        "sampler": {"class_path": "hybrid_lightning.rollout.sampler.Sampler"},
                        "advantage": {"class_path": "hybrid_lightning.advantages.GroupAdvantage"},
                        "schedule": {"class_path": "hybrid_lightning.policy.optim.ConstantSchedule"},
                    },
                },
                "data": {"class_path": "hybrid_lightning.data.PromptDataModule"},
                "adapter.budget": {"class_path": "hybrid_lightning.adapters.budgets.ModuleBudget"},
                "adapter.scorer": {"class_path": "hybrid_lightning.adapters.scorers.PreconditionedTail"},
                "adapter.gradients": {"class_path": "hybrid_lightning.adapters.accumulators.ExactGradients"},
                "checkpoint.save_last": True,
                "checkpoint.filename": "step={step}",
                "checkpoint.auto_insert_metric_name": False,
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,  # the plan says what is trained
                "trainer.num_sanity_val_steps": -1,  # all of it: the accuracy before training
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": "default", "default_hp_metric": False},
                },
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that have no options; those with clocks first, since scoring counts."""
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "plan":
            self._flags = TrainerFlags.of(config)
        if self.subcommand in ("export", "plan"):
            for name, value in _TRAINER_WITHOUT_DEVICE.items():
                config[name] = value
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        fixed: list[Callback] = [StepTimer(), RunSummary(), EvaluationReport(), GracefulStop(self._signals)]
        if config["logger"] and not config["fast_dev_run"]:
            fixed += [LearningRateMonitor(logging_interval="step"), TensorBoardOverview()]
        if config["enable_progress_bar"] is not False:
            fixed.append(RolloutProgress())
        try:
            trainer = super().instantiate_trainer(callbacks=[*fixed, *given], **kwargs)
        except (TypeError, ValueError) as error:  # Lightning's own checks of its flags
            raise ConfigError(f"trainer: {error}") from error
        assert isinstance(trainer, Trainer)
        # The config is there before the modules are scored, which may take an hour and be stopped.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, (StepTimer, SaveRunConfig)))  # type: ignore[attr-defined]
        return trainer

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._asked in self.subcommands() and subcommand != self._asked:
            return self.init_parser(**kwargs)  # a name among the choices: making all its options takes long
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # Lightning's own table, of what EvaluationReport shows
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        """Find what is wrong with data, reward and settings, and only then load the model, which takes longest.

        An export reads the weights itself, in the dtype that it wants, and a plan none.
        """
        if subcommand not in ("export", "plan"):
            assert isinstance(self.trainer, Trainer)
            if isinstance(self.model, SteppedModule):
                self.trainer.check(self.model, self.datamodule, subcommand)
            self.model.load()
        super()._run_subcommand(subcommand)

    def _add_instantiators(self) -> None:
        """Make the MLflow logger that works, and policies that are not loaded; for a plan their arguments are all it wants."""
        super()._add_instantiators()
        self.parser.add_instantiator(_mlflow_logger, MLFlowLogger)
        make = _arguments_of if self.subcommand == "plan" else partial(_unloaded, _InstantiatorFn(cli=self, key="model"))
        self.parser.add_instantiator(make, LanguageModule, subclasses=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        return {**arguments, "flags": self._flags} if subcommand == "plan" else arguments

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint silently: Lightning would let it override what the command line says."""


def _arguments_of(policy: type, *given: Any, applied_instantiation_links: Any, **named: Any) -> Any:
    if not issubclass(policy, PolicyModule):
        raise ConfigError(f"plan knows the memory of PolicyModule, but model is a {policy.__name__}; give a config of RL")
    return policy_arguments(policy, *given, **named)


def _unloaded(
    make: Callable[..., Any], policy: type[LanguageModule], *given: Any, applied_instantiation_links: Any, **named: Any
) -> Any:
    return make(policy.unloaded, *given, applied_instantiation_links=applied_instantiation_links, **named)


def _mlflow_logger(logger: type, *given: Any, applied_instantiation_links: Any, **named: Any) -> Any:
    return (NamingMLFlowLogger if logger is MLFlowLogger else logger)(*given, **named)


def main(signals: StopSignals | None = None) -> None:
    """Run the command line; what a user got wrong is said in the last line, without a traceback.

    Args:
        signals: Of this process; None leaves them alone until the command trains, validates, tests or predicts.
    """
    _quiet_libraries()
    signals = signals or StopSignals()
    try:
        HybridLightningCLI(signals)
    except Exception as error:
        cause = _cause(error)
        if cause is None and not signals.requested:  # not foreseen: the traceback is needed, of what was raised first
            raise _unwrapped(error)  # noqa: B904
        _print_error(str(cause or error))
        signals.check()  # which may be why: another rank has gone, or a library gave up
        sys.exit(1)


def _cause(error: BaseException | None) -> BaseException | None:
    """The error in a chain that was raised for the user; jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, (HybridLightningError, MisconfigurationException, FileNotFoundError)):
            return error
        error = error.__cause__
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """What a constructor raised, from below jsonargparse's account of a union, whose last line is the whole config."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _readable(message: str) -> str:
    for pattern, replacement in _REWRITES:
        message = re.sub(pattern, replacement, message, flags=re.DOTALL)
    return message


def _print_error(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def _quiet_libraries() -> None:
    """Silence advice that does not apply here, so that what matters can be read."""
    transformers.utils.logging.disable_progress_bar()
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()  # of downloads, which transformers has just switched off with its own
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for each page of samples
    # LightningModule and data module share this hook by design.
    warnings.filterwarnings("ignore", message=".*overridden `transfer_batch_to_device`.*")
    # Deprecations between the libraries, which their next versions settle.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch.nn.modules.module|peft")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # Every run has a folder of its own; the checkpoint of another is meant to be read from there.
    warnings.filterwarnings("ignore", message=".*dirpath has changed from.*")
    # One that was changed at a resume is another one to Lightning; the resume says so by the names of its options.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    # The loaders hold prompts or make rollouts; worker processes would not help.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Prompts that ranks are given twice are counted once.
    warnings.filterwarnings("ignore", message=".*Using `DistributedSampler` with the dataloaders.*")
    # The policy is frozen and in eval mode as loaded; the adapter decides what trains.
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")

"""`RunSummary`: summarizes a run: accuracy and reward before and after, trained modules, time, and the next commands."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from hybrid_lightning.callbacks.diagnosis import Diagnosis
from hybrid_lightning.callbacks.display import console, evaluation_command, say
from hybrid_lightning.callbacks.hybrid_adapter_setup import HybridAdapterSetup
from hybrid_lightning.callbacks.loggers import curve_hints, log_numbers, show_hyperparameters
from hybrid_lightning.callbacks.planning import applied_plan
from hybrid_lightning.callbacks.rollouts import say_completions
from hybrid_lightning.callbacks.run_folder import find_callback, run_folder
from hybrid_lightning.callbacks.run_report import RunReport, shares_ahead
from hybrid_lightning.callbacks.run_settings import arguments_of
from hybrid_lightning.callbacks.step_timer import StepTimer
from hybrid_lightning.errors import shorten
from hybrid_lightning.metrics import LOWER, UPPER, Difference
from hybrid_lightning.reports.verdict import GREEDY, REWARD, most_frequent, shown_difference, unequal_rows
from hybrid_lightning.shared.configurable import as_call
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.policy_module import PolicyModule

# Validation metric -> its name on the screen.
_SHORT = {"greedy_accuracy": "greedy", "completion_length": "length", "truncation_rate": "unfinished"}


class RunSummary(Callback):
    """Prints a summary at the end of `fit` and writes it as `summary.json`.

    With `num_sanity_val_steps: -1` Lightning's sanity check covers all validation data and gives the values before training; a
    resumed run takes them from the checkpoint. If training does not end with a validation, one is made. Without validation both
    are null. A metric that compares the policy with the start policy, DPO's `rewards/accuracies`, is null before training, where
    loggers get 0 as in TRL. The summary has times by phase if a `StepTimer` comes before this callback, a verdict if there is a
    `Diagnosis`, and intervals of the changes if there is a `RunReport`, which keeps the results of each problem.

    `next_command` is a command that can be run as it is. It is empty for a run from Python, which has no config.

    Loggers get the accuracy (for supervised and preference training the loss) before and after as separate scalars,
    `summary/accuracy_before` and so on. With the reward, they are the results on TensorBoard's page of hyperparameters.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._earlier_seconds = 0.0  # time of the earlier runs that this one resumes
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._answers: dict[str, Any] = {}  # the most frequent answers of the last validation
        self._validated_step = -1
        self._train_start = self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, before the modules are scored."""
        if stage == "fit":
            self._start = time.perf_counter()
            run_folder(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Measurements and time so far, for a resumed run."""
        return {
            "before": self._before,
            "after": self._after,
            "answers": self._answers,
            "validated_step": self._validated_step,
            "seconds": self._earlier_seconds + time.perf_counter() - self._start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the measurements and the time of the resumed run."""
        self._before, self._earlier_seconds = state_dict["before"], state_dict["seconds"]
        self._after, self._validated_step = state_dict["after"], state_dict["validated_step"]
        self._answers = state_dict.get("answers", {})

    def without_measurements(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `Measuring`."""
        return {**state, "before": {}, "after": {}, "validated_step": -1}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the start policy, and log them as step 0."""
        loaders = trainer.num_sanity_val_batches
        if all(checked >= total for checked, total in zip(loaders, trainer.num_val_batches, strict=True)):
            self._before = _validation_metrics(trainer)
            log_numbers(trainer, self._before, step=0)
            for name in shares_ahead(pl_module) & self._before.keys():
                del self._before[name]
            self._print_validation(trainer, "start", self._before)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record when scoring and sanity check have ended, and log the hyperparameters with the expected results."""
        self._train_start = time.perf_counter()
        results = [f"summary/{name}_{when}" for name in _measures(pl_module) for when in ("before", "after")]
        results += ["reward"] if isinstance(pl_module, PolicyModule) else []
        arguments = arguments_of(pl_module)
        show_hyperparameters(trainer, _compared(pl_module, arguments), arguments, results)
        log_numbers(trainer, _results(pl_module, "before", self._before), step=0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._after, self._validated_step = _validation_metrics(trainer), trainer.global_step
            self._answers = most_frequent(pl_module.evaluation.answers) if isinstance(pl_module, LanguageModule) else {}
            self._print_validation(trainer, f"step {trainer.global_step}", self._after)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate if the last step has not been validated, and log the results."""
        if trainer.enable_validation and self._validated_step != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        if self._validated_step == trainer.global_step:
            log_numbers(trainer, _results(pl_module, "after", self._after), step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the summary, after all checkpoints have been written."""
        folder = run_folder(trainer)
        if folder is None or trainer.global_step == 0:
            return
        summary = self._summary(trainer, pl_module)  # on every process, because parameters may be split over processes
        if trainer.is_global_zero:
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            curves, report = curve_hints(trainer, folder), find_callback(trainer, RunReport)
            commands = [command for command in (summary["next_command"], *curves) if command]
            page = None if report is None else report.write(trainer, "finished", commands)
            self._print(summary, curves, page, "accuracy" in _measures(pl_module))

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        plan, now = applied_plan(pl_module), time.perf_counter()
        trainable = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        base = sum(parameter.numel() for parameter in pl_module.parameters())
        base = pl_module.policy.base_parameters if isinstance(pl_module, LanguageModule) else base
        checkpoint = trainer.checkpoint_callback
        last = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
        # If a finished run is resumed, nothing is trained or validated, and its checkpoint may have only an earlier validation.
        after = self._after if self._validated_step == trainer.global_step else {}
        samples = _eval_samples(pl_module)
        timer, adapter = find_callback(trainer, StepTimer), find_callback(trainer, HybridAdapterSetup)
        report, names = find_callback(trainer, RunReport), {"accuracy": f"val/avg@{samples}", "greedy": GREEDY, "reward": REWARD}
        both = [name for name, metric in names.items() if report is not None and metric in self._before.keys() & after.keys()]
        changes = {name: change for name in both if (change := report.change(names[name])) is not None}  # type: ignore[union-attr]
        verdict, tries = self._verdict(trainer, pl_module, after, changes)
        sides = (("before", self._before), ("after", after))
        return {
            **{f"{name}_{when}": side.get(metric) for name, metric in names.items() for when, side in sides},
            "differences": {name: change._asdict() for name, change in changes.items()},
            "answers": self._answers if after else {},
            "seconds": round(self._earlier_seconds + now - self._start, 2),
            "training_seconds": round(now - self._train_start, 2),
            "seconds_by_phase": {} if timer is None else {name: round(value, 3) for name, value in timer.totals().items()},
            "throughput": {} if timer is None else {name: round(value, 1) for name, value in timer.rates().items()},
            "steps": trainer.global_step,
            "eval_samples": samples,
            "full_modules": [] if plan is None else list(plan.full_modules),
            "lora_modules": 0 if plan is None else len(plan.lora_modules),
            "trainable_parameters": trainable,
            "trainable_share": round(trainable / base, 6),
            "loss": _loss_name(pl_module),
            "model": str(pl_module.hparams.get("model", "")),
            "validation": {"before": {**self._before, **dict.fromkeys(shares_ahead(pl_module) & after.keys())}, "after": after},
            "changes": [] if adapter is None else adapter.resume.record(),  # at resumes
            "verdict": verdict,
            "try": tries,
            "run_folder": str(run_folder(trainer)),
            "checkpoint": str(last),
            "next_command": evaluation_command(trainer, last) if last and trainer.is_global_zero else "",
        }

    def _verdict(
        self, trainer: Trainer, pl_module: LightningModule, after: Mapping[str, float], changes: Mapping[str, Difference]
    ) -> tuple[str, list[str]]:
        diagnosis = find_callback(trainer, Diagnosis)
        if diagnosis is None:
            return "", []
        losses = (self._before["val/loss"], after["val/loss"]) if "val/loss" in self._before.keys() & after.keys() else None
        answers = self._answers if after else {}
        prompts = getattr(trainer.datamodule, "train_prompts", None) or ()  # type: ignore[attr-defined]
        unequal = unequal_rows(answers["given"], (prompt.answer for prompt in prompts)) if answers.get("given") else ""
        doubt = pl_module.task.generation.doubt if isinstance(pl_module, LanguageModule) else ""
        one_answer = answers.get("one_answer", "")
        return diagnosis.verdict(changes.get("accuracy"), changes.get("reward"), losses, one_answer, unequal, doubt)

    def _print_validation(self, trainer: Trainer, when: str, metrics: dict[str, float]) -> None:
        module = trainer.lightning_module
        if trainer.is_global_zero and metrics:
            sets = module.evaluation.last if isinstance(module, LanguageModule) else ()
            say(f"Validation ({when}): {_headline(metrics, sets, _eval_samples(module))}")
            say_completions(module)

    def _print(self, summary: dict[str, Any], curves: list[str], page: Path | None, measured: bool) -> None:
        table = Table(title="What happened", title_justify="left", show_header=False)
        samples = summary["eval_samples"]
        before, after = (summary["validation"][when] for when in ("before", "after"))
        if "val/loss" in after:
            first = f"{before['val/loss']:.4f}" if "val/loss" in before else "not measured"
            table.add_row("held-out loss", f"{first} -> {after['val/loss']:.4f}")
        if "val/rewards/accuracies" in after:  # a comparison with the start policy, without a value before training
            preferred = f"{after['val/rewards/accuracies']:.1%} of pairs, compared with the start policy (chance: 50%)"
            table.add_row("preferred as chosen", preferred)
        if summary["reward_before"] is not None or summary["reward_after"] is not None or table.row_count == 0:
            names = {"accuracy": f"accuracy (avg@{samples})", "reward": "reward", "greedy": "greedy accuracy"}
            problems = f", n={after['val/problems']:.0f}" if "val/problems" in after else ""
            for name in names if measured else ("reward",):
                table.add_row(names[name], _change(summary, name) + problems)
                problems = ""  # once
            if summary["answers"]:
                answer, share = shorten(summary["answers"]["reference"]), summary["answers"]["share"]
                table.add_row("constant answer", f"{answer} for every problem would be right for {share:.1%}")
        full = len(summary["full_modules"])
        modules = f"{full} module{'' if full == 1 else 's'} fully, {summary['lora_modules']} by LoRA"
        trainable = f"{summary['trainable_parameters']:,} parameters, {summary['trainable_share']:.1%} of the model"
        table.add_row("trained", f"{modules}; {trainable}")
        table.add_row("time", _time(summary))
        if summary["throughput"]:
            table.add_row("speed", _speed(summary["throughput"]))
        console().print(table)
        lines = [("Run folder", summary["run_folder"]), *(("Curves", curve) for curve in curves), ("Report", page)]
        lines += [("Next", summary["next_command"]) if summary["next_command"] else ("Checkpoint", summary["checkpoint"])]
        lines += [("Verdict", summary["verdict"]), *(("Try", advice) for advice in summary["try"] if summary["verdict"])]
        for name, text in lines:
            if text:
                say(f"{name + ':':<12}{text}")


def _compared(pl_module: LightningModule, arguments: dict[str, Any]) -> dict[str, Any]:
    """What people compare runs by: the first columns of TensorBoard's page of hyperparameters."""
    plan = applied_plan(pl_module)
    lora = plan.lora if plan is not None and plan.lora_modules else None
    rates = pl_module.rates if isinstance(pl_module, LanguageModule) else {}
    sizes = ("prompts_per_rollout", "samples_per_prompt", "minibatches_per_rollout", "examples_per_step")
    found = {
        "model": arguments.get("model"),
        "loss": _loss_name(pl_module),
        "adapter": None if plan is None else plan.method,
        "budget": None if plan is None else as_call(plan.budget),
        "rank": None if lora is None else lora.rank,
        "alpha": None if lora is None else lora.alpha,
        **{f"lr_{group}": rates[group] for group in ("lora", "full") if group in rates},
        **{name: arguments.get(name) for name in sizes},
        "max_new_tokens": pl_module.task.generation.sampler.max_new_tokens if isinstance(pl_module, LanguageModule) else None,
        "seed": arguments.get("seed"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _validation_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def _loss_name(pl_module: LightningModule) -> str:
    return type(pl_module.task.loss if isinstance(pl_module, LanguageModule) else getattr(pl_module, "loss", None)).__name__


def _eval_samples(pl_module: LightningModule) -> int:
    return pl_module.task.evaluation.samples if isinstance(pl_module, LanguageModule) else 1


def _measures(pl_module: LightningModule) -> dict[str, str]:
    """Name of a result in the summary -> the validation metric that has its value."""
    measured = isinstance(pl_module, LanguageModule) and pl_module.task.generation.measures_correctness
    losses = {} if isinstance(pl_module, PolicyModule) else {"loss": "val/loss"}
    return losses | ({"accuracy": f"val/avg@{_eval_samples(pl_module)}"} if measured else {})


def _results(pl_module: LightningModule, when: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"summary/{name}_{when}": metrics[metric] for name, metric in _measures(pl_module).items() if metric in metrics}


def _headline(metrics: dict[str, float], sets: Iterable[str], samples: int) -> str:
    """Metrics in one line, accuracy and reward first: over all sets together, and only the largest k of each `METRIC@k`."""
    hidden, accuracy = (*(f"{name}/" for name in sets if name), "problems", "greedy_reward"), f"avg@{samples}"
    values = {name.removeprefix("val/"): value for name, value in metrics.items()}
    overall = {name: value for name, value in values.items() if not name.startswith(hidden)}
    shown, count = {}, f"n={values['problems']:.0f}, " if "problems" in values else ""
    if accuracy in overall:
        ends = [f"{100 * overall[f'{accuracy}/{end}']:.1f}" for end in (LOWER, UPPER) if f"{accuracy}/{end}" in overall]
        interval = f" [{', '.join(ends)}]" if ends else ""
        shown[accuracy] = f"accuracy {overall[accuracy]:.1%}{interval} ({count}{accuracy})"
    largest = max((int(name.partition("@")[2]) for name in overall if "@" in name and "/" not in name), default=0)
    for name, value in sorted(overall.items(), key=lambda item: item[0] != "reward"):
        if not name.endswith((f"/{LOWER}", f"/{UPPER}")) and ("@" not in name or name.endswith(f"@{largest}")):
            digits = ".1%" if f"{name}/{LOWER}" in overall else ".1f" if name == "completion_length" else ".3f"
            shown.setdefault(name, f"{_SHORT.get(name, name)} {value:{digits}}")
    return "  ".join(shown.values())


def _change(summary: dict[str, Any], name: str) -> str:
    """A text such as "25.0% -> 50.0% (+25.0 points [+3.1, +42.0])"."""
    before, after = sides = summary[f"{name}_before"], summary[f"{name}_after"]
    metric, digits = (REWARD, ".3f") if name == "reward" else (name, ".1%")
    shown = " -> ".join("not measured" if value is None else f"{value:{digits}}" for value in sides)
    if before is None or after is None:
        return shown
    change = summary["differences"].get(name) or Difference(after - before, math.nan, math.nan, 0)._asdict()
    return f"{shown} ({shown_difference(Difference(**change), metric)})"


def _time(summary: dict[str, Any]) -> str:
    """A text such as "68 s for 100 optimizer steps: generate 35%, update 41%, other 24%", without shares that round to 0."""
    total = f"{summary['seconds']:.0f} s for {summary['steps']} optimizer steps"
    shares = {name: seconds / summary["seconds"] for name, seconds in summary["seconds_by_phase"].items()}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    return f"{total}: {parts}" if parts else f"{total}, scoring and validation included"


def _speed(throughput: dict[str, float]) -> str:
    """Tokens per second as text, the total rate first."""
    names = {"tokens": "prompts and completions", "generated_tokens": "generation", "trained_tokens": "training"}
    rates = {text: throughput[f"{name}_per_second"] for name, text in names.items() if f"{name}_per_second" in throughput}
    return "tokens/s: " + ", ".join(f"{text} {rate:,.0f}" for text, rate in rates.items())

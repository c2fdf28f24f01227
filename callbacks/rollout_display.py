"""Show rollouts: `RolloutProgress` on the screen while they are generated, and `RolloutSamples` in the loggers."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from hybrid_lightning.callbacks.loggers import log_histogram, log_table
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Rewards, Rollouts


class RolloutProgress(RichProgressBar):
    """Lightning's progress bar with reward and completion length, and a second bar with the tokens of a rollout in progress."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._generation_task: Any = None

    @property
    def total_train_batches(self) -> int | float:
        """Number of micro-batches in this epoch, limited by `max_steps`."""
        of_epoch = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return of_epoch
        done = (self.trainer.fit_loop.batch_idx + 1) % of_epoch  # at the start of an epoch Lightning still has the last batch_idx
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(of_epoch, done + left)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start listening to the generation of rollouts."""
        super().setup(trainer, pl_module, stage)
        listeners = getattr(pl_module, "generation_listeners", None)
        if listeners is not None and self._show_generation not in listeners:
            listeners.append(self._show_generation)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Metrics to show, without the version number of the run folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)  # type: ignore[assignment]
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Text before the training bar. Lightning's would be "Epoch 0/-2" if `max_steps` ends the run."""
        return f"Training (epoch {current_epoch})"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening to the generation."""
        super().teardown(trainer, pl_module, stage)
        listeners = getattr(pl_module, "generation_listeners", [])
        if self._show_generation in listeners:
            listeners.remove(self._show_generation)

    def _stop_progress(self) -> None:
        """Take the bar away, so that what the run says at its end is the end of the screen."""
        if self.progress is not None:
            self.progress.live.transient = True
        super()._stop_progress()

    def _show_generation(self, running: int, decoded: int, total: int) -> None:
        if self.progress is None or self._progress_stopped or self.is_disabled:
            return
        if self._generation_task not in self.progress.task_ids:
            self._generation_task = self._add_task(total, "Generating")
        done = running == 0 or decoded == total
        self.progress.update(self._generation_task, completed=decoded, total=total, visible=not done)


class RolloutSamples(Callback):
    """Logs pages of sampled completions with rewards and advantages, and histograms of the rewards.

    Args:
        every_n_rollouts: Number of rollouts from one page to the next.
        prompts: Number of prompts on a page.
        completions: Number of completions shown for each prompt.
    """

    def __init__(self, every_n_rollouts: int = 10, prompts: int = 4, completions: int = 4) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("prompts", prompts), ("completions", completions)):
            if value < 1:
                raise ConfigError(f"samples.{name} must be at least 1, got {value}")
        self.every_n_rollouts, self.prompts, self.completions = every_n_rollouts, prompts, completions
        self._seen = 0
        self._last: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rollout of the batch, once for each rollout."""
        rollout = getattr(pl_module, "last_rollout", None)
        if rollout is None or rollout is self._last:
            return
        self._last = rollout
        if self._seen % self.every_n_rollouts == 0 and trainer.is_global_zero:
            columns, rows = self.table(*rollout)
            log_table(trainer, "samples", columns, rows, trainer.global_step, self.page(*rollout))
            log_histogram(trainer, "rewards/histogram", rollout[1].total.float().cpu(), trainer.global_step)
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of rollouts, so that a resumed run writes the same pages as a run that was not stopped."""
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of rollouts."""
        self._seen = state_dict["seen"]

    def table(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> tuple[list[str], list[list[Any]]]:
        """The first prompts and completions as a table: names of the columns, and rows of texts and numbers."""
        names = list(rewards.parts) if len(rewards.parts) > 1 else []
        samples = rollouts.samples_per_prompt
        rows: list[list[Any]] = []
        for number, prompt in enumerate(rollouts.prompts[: self.prompts]):
            for row in range(number * samples, number * samples + min(samples, self.completions)):
                text = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
                rows.append(
                    [
                        str(text)[-300:],
                        str(prompt.answer),
                        rollouts.completions[row],
                        "yes" if bool(rollouts.finished[row]) else "no",
                        "yes" if bool(rewards.correct[row]) else "no",
                        float(rewards.total[row]),
                        *(float(rewards.parts[name][row]) for name in names),
                        float(advantages[row]),
                    ]
                )
        return ["prompt", "answer", "completion", "finished", "correct", "reward", *names, "advantage"], rows

    def page(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> str:
        """The table as Markdown, in which "(cut)" marks completions that are not finished."""
        columns, rows = self.table(rollouts, rewards, advantages)
        columns.remove("finished")
        lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for prompt, answer, completion, finished, correct, *numbers, advantage in rows:
            texts = [_cell(prompt), _cell(answer), _cell(completion) + ("" if finished == "yes" else " *(cut)*"), correct]
            lines.append(f"| {' | '.join([*texts, *(f'{number:.3g}' for number in numbers), f'{advantage:+.3f}'])} |")
        return "\n".join(lines)


# Escapes for every character that Markdown or HTML would take for markup, and for line breaks, since a row must be one line.
_AS_TEXT = str.maketrans({**{c: f"&#{ord(c)};" for c in "&<>|\\`*_{}[]()#+-!~"}, "\n": "<br>", "\r": None})


def _cell(text: str) -> str:
    """Text escaped for a cell of a Markdown table."""
    return text.translate(_AS_TEXT) or "*(empty)*"

"""How a run shows its rollouts.

`RolloutSamples` logs pages of them and writes all of them to a file, and `RewardDivergence` warns when a part of the reward rises
while correctness falls (reward hacking).
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.cells import cell_len, set_cell_size

from hybrid_lightning.callbacks.display import console, say
from hybrid_lightning.callbacks.loggers import log_histogram, log_table
from hybrid_lightning.callbacks.prediction_writer import new_file, write_lines
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.types import Completion, Prompt, Rollout

_ON_SCREEN = 1_000  # characters of an episode
_LINES = 2  # completions of a validation on the screen
_SAID = {True: "yes", False: "no", None: "left out"}


class OncePerRollout(Callback, ABC):
    """Base of callbacks that look at each rollout once, when it is trained on, even if it is split into several batches."""

    _last: int | None = None  # number of the last rollout seen

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the rollout of the batch if it is new."""
        if getattr(batch, "rollout", None) is not None and batch.rollout_number != self._last:
            self._last = batch.rollout_number
            self.on_rollout(trainer, batch)

    @abstractmethod
    def on_rollout(self, trainer: Trainer, batch: Any) -> None:
        """Look at a rollout, `batch.rollout`, by its first batch."""

    def state_dict(self) -> dict[str, Any]:
        """The last rollout seen, so that a run resumed within it does not look at it again."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last rollout seen."""
        self._last = state_dict["last"]


class RolloutSamples(OncePerRollout):
    """Logs pages of sampled completions with rewards and advantages, and histograms of the rewards.

    For an episode, a page has the messages with their roles; the first episode of a page is also shown on the screen.

    Args:
        every_n_rollouts: Number of rollouts from one page to the next.
        prompts: Number of prompts on a page; None for all of the first process.
        completions: Number of completions shown for each prompt; None for all.
        write_rows: Whether to write all completions of every rollout to `rollouts.jsonl` in the run folder, one per line, when
            training on the rollout begins: step, rollout, prompt, completion, rewards (total and parts), advantage, and more.
            With several processes each writes its own file, with the rank before the suffix.
    """

    def __init__(
        self, every_n_rollouts: int = 10, prompts: int | None = 4, completions: int | None = 4, write_rows: bool = False
    ) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("prompts", prompts), ("completions", completions)):
            if value is not None and value < 1:
                raise ConfigError(f"samples.{name} must be at least 1, got {value}")
        self.every_n_rollouts, self.prompts, self.completions = every_n_rollouts, prompts, completions
        self.write_rows = write_rows
        self._path: Path | None = None  # rows of this fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose a new file for the rows."""
        folder = run_folder(trainer)
        self._path = new_file(folder, "rollouts", trainer) if self.write_rows and folder is not None else None

    def on_rollout(self, trainer: Trainer, batch: Any) -> None:
        """Log a page of the rollout if one is due, and write its rows."""
        rollout: Rollout = batch.rollout
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                write_lines(file, self._rows(trainer, rollout))
        if batch.rollout_number % self.every_n_rollouts == 0 and trainer.is_global_zero:
            rewards = rollout.scored
            columns, rows = self.table(rollout)
            log_table(trainer, "samples", columns, rows, trainer.global_step)
            if len(values := rewards.of_counted().total):
                log_histogram(trainer, "rewards/histogram", values.float().cpu(), trainer.global_step)
            if rollout.completions[0].episode is not None:
                text = shown_text(rollout.completions[0]).replace("\n", "\n  ")
                earned = f"reward {float(rewards.total[0, 0]):.3g}" if rewards.counts(0, 0) else "left out"
                say(f"An episode of rollout {batch.rollout_number + 1}, {earned}:\n  {text[:_ON_SCREEN]}")

    def _rows(self, trainer: Trainer, rollout: Rollout) -> Iterator[dict[str, Any]]:
        """A JSON-ready record of each completion; a completion that is left out has no rewards."""
        policy: Any = trainer.lightning_module
        texts = [policy.policy.pretrained.encoder.render(prompt) for prompt in rollout.prompts]
        rewards, advantages = rollout.scored.apply(torch.Tensor.cpu), rollout.mean_advantages.cpu()
        for row, completion in enumerate(rollout.completions):
            place = number, sample = divmod(row, rollout.group_size)
            prompt, episode, counts = rollout.prompts[number], completion.episode, rewards.counts(*place)
            yield {
                "step": trainer.global_step,
                "rollout": self._last,
                "set": prompt.set_name,
                "index": prompt.index,
                "sample": sample,
                "prompt": texts[number],
                "answer": prompt.answer,
                "completion": str(completion),
                **({} if episode is None else {"messages": [dict(message) for message in episode.messages], "end": episode.end}),
                "length": completion.num_tokens,
                "finished": completion.finished,
                "counted": counts,
                "reward": float(rewards.total[place]) if counts else None,
                "reward_parts": {name: float(part[place]) if counts else None for name, part in rewards.parts.items()},
                "correct": rewards.right(*place),
                "advantage": float(advantages[place]),
            }

    def table(self, rollout: Rollout) -> tuple[list[str], list[list[Any]]]:
        """The first prompts and completions as a table: column names, and rows of texts and numbers."""
        rewards, advantages = rollout.scored, rollout.mean_advantages
        names = list(rewards.parts) if len(rewards.parts) > 1 else []
        rows: list[list[Any]] = []
        for number, prompt in enumerate(rollout.prompts[: self.prompts]):
            for sample in range(rollout.group_size)[: self.completions]:
                place, completion = (number, sample), rollout.completions[number * rollout.group_size + sample]
                texts = [shown_prompt(prompt), str(prompt.answer), shown_text(completion)]
                counts = rewards.counts(*place)
                finished, right = _SAID[completion.finished], _SAID[rewards.right(*place)]
                marks = [finished, right] if rewards.measures_correctness else [finished if counts else _SAID[None]]
                values = (rewards.total, *(rewards.parts[name] for name in names), advantages)
                numbers = [float(value[place]) for value in values] if counts else [None] * len(values)
                rows.append([*texts, *marks, *numbers])
        marked = ["finished", "correct"] if rewards.measures_correctness else ["finished"]
        return ["prompt", "answer", "completion", *marked, "reward", *names, "advantage"], rows


def shown_prompt(prompt: Prompt) -> str:
    """The end of a prompt, or of its last message."""
    return str(prompt.text if prompt.messages is None else prompt.messages[-1]["content"])[-300:]


def shown_text(completion: Completion) -> str:
    """The text of a completion; for an episode its messages with their roles, starting with the policy's first."""
    episode = completion.episode
    if episode is None:
        return str(completion)
    first = next((n for n, message in enumerate(episode.messages) if message["role"] == "assistant"), len(episode.messages))
    speakers = (" ".join(filter(None, (message["role"], message.get("name")))) for message in episode.messages[first:])
    lines = [f"{who}: {message['content']}" for who, message in zip(speakers, episode.messages[first:], strict=True)]
    return "\n".join([*lines, f"({episode.end})"])


def say_completions(pl_module: LightningModule) -> None:
    """Print the greedy completions of a validation's first prompts, one per line of the screen's width; in notebooks none."""
    greedy = pl_module.evaluation.greedy if isinstance(pl_module, LanguageModule) else None
    if greedy is None or console().is_jupyter:
        return
    rewards = greedy.scored
    for number, (prompt, completion) in enumerate(zip(greedy.prompts[:_LINES], greedy.completions, strict=False)):
        end = f" (reward {float(rewards.total[number, 0]):.3g})" if rewards.counts(number, 0) else " (left out)"
        room = max(20, console().width - len(f"   -> {end}"))
        asked = _ending(shown_prompt(prompt), room // 2)
        say(f"  {asked} -> {_ending(shown_text(completion), room - cell_len(asked)) or '(empty)'}{end}")


def _ending(text: str, width: int) -> str:
    """The end of a text in one line of at most `width` columns."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if cell_len(line) <= width else "..." + set_cell_size(line[::-1], width - 3)[::-1].lstrip()


class RewardDivergence(OncePerRollout):
    """Compares the older with the newer half of the last rollouts, and warns once for each part of the reward with a weight.

    For example, a reward of 0.1 for ending a completion can make a policy end at once: the reward rises, the accuracy falls.

    Args:
        window: Number of rollouts to compare; an even number.
        standard_errors: Minimum size of both changes, in standard errors.
    """

    def __init__(self, window: int = 20, standard_errors: float = 2.0) -> None:
        if window < 4 or window % 2:
            raise ConfigError(f"divergence.window must be an even number of at least 4, got {window}")
        if not standard_errors > 0:
            raise ConfigError(f"divergence.standard_errors must be positive, got {standard_errors}")
        self.window, self.standard_errors = window, standard_errors
        self._history: deque[dict[str, float]] = deque(maxlen=window)
        self._warned: set[str] = set()

    def on_rollout(self, trainer: Trainer, batch: Any) -> None:
        """Record the rollout's means, and warn of parts that diverge."""
        rewards = batch.rollout.rewards.of_counted()
        if not len(rewards.total) or not rewards.measures_correctness:
            return
        paid = [name for name in rewards.parts if rewards.weights.get(name, 1.0) > 0]  # excludes metrics and penalties
        means = {f"rewards/{name}": float(rewards.parts[name].mean()) for name in paid}
        self._history.append({"accuracy": float(rewards.correct.float().mean()), **means})
        for name in self.diverging():
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"{name} rose while the share of correct completions fell over the last {self.window} rollouts (step "
                    f"{trainer.global_step}): the policy may be exploiting this part of the reward; lower its weight or remove it"
                )

    def state_dict(self) -> dict[str, Any]:
        """The history, so that a resumed run warns in the same place as a run that was not stopped."""
        return {**super().state_dict(), "history": list(self._history), "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        super().load_state_dict(state_dict)
        self._history.extend(state_dict["history"])  # a smaller window keeps the newest entries
        self._warned.update(state_dict["warned"])

    def diverging(self) -> list[str]:
        """Parts of the reward that rise while the accuracy falls, over the last `window` rollouts."""
        if len(self._history) < self.window or self._change("accuracy") > -self.standard_errors:
            return []
        return [name for name in self._history[-1] if name != "accuracy" and self._change(name) >= self.standard_errors]

    def _change(self, name: str) -> float:
        """Change of a value from the older to the newer half, in standard errors."""
        values = [entry.get(name, 0.0) for entry in self._history]
        half = self.window // 2
        old, new = values[:half], values[half:]
        change, error = fmean(new) - fmean(old), math.sqrt((variance(old) + variance(new)) / half)
        if change == 0:
            return 0.0
        return change / error if error > 0 else math.copysign(math.inf, change)

"""`RolloutSamples`: what the policy says, on TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybrid_lightning.callbacks.display import tensorboard_writers
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Rewards, Rollouts


class RolloutSamples(Callback):
    """Writes a page of sampled completions with rewards and advantages, and a histogram of the rewards.

    Args:
        every_n_rollouts: Rollouts between two pages.
        prompts: Prompts shown on a page.
        completions: Completions shown of each.
    """

    def __init__(self, every_n_rollouts: int = 10, prompts: int = 4, completions: int = 4) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("prompts", prompts), ("completions", completions)):
            if value < 1:
                raise ConfigError(f"samples.{name} must be at least 1, got {value}")
        self.every_n_rollouts, self.prompts, self.completions = every_n_rollouts, prompts, completions
        self._seen = 0
        self._last: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the rollout that the batch comes from, once."""
        rollout = getattr(pl_module, "last_rollout", None)
        if rollout is None or rollout is self._last:
            return
        self._last = rollout
        if self._seen % self.every_n_rollouts == 0 and trainer.is_global_zero:
            for writer in tensorboard_writers(trainer):
                writer.add_text("samples", self.page(*rollout), trainer.global_step)
                writer.add_histogram("rewards/histogram", rollout[1].total.float().cpu(), trainer.global_step)
        self._seen += 1

    def page(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> str:
        """A Markdown table of the first prompts and completions."""
        names = list(rewards.parts)
        columns = ["prompt", "answer", "completion", "correct", "reward", *(names if len(names) > 1 else []), "advantage"]
        lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        samples = rollouts.samples_per_prompt
        for number, prompt in enumerate(rollouts.prompts[: self.prompts]):
            for row in range(number * samples, number * samples + min(samples, self.completions)):
                text = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
                parts = [f"{float(rewards.parts[name][row]):.3g}" for name in names] if len(names) > 1 else []
                cells = [
                    _cell(str(text)[-300:]),
                    _cell(str(prompt.answer)),
                    _cell(rollouts.completions[row]) + ("" if bool(rollouts.finished[row]) else " *(cut)*"),
                    "yes" if bool(rewards.correct[row]) else "no",
                    f"{float(rewards.total[row]):.3g}",
                    *parts,
                    f"{float(advantages[row]):+.3f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


# Everything that Markdown or HTML would take for markup, as what it looks like; one line, since a line is a row.
_AS_TEXT = str.maketrans({**{c: f"&#{ord(c)};" for c in "&<>|\\`*_{}[]()#+-!~"}, "\n": "<br>", "\r": None})


def _cell(text: str) -> str:
    """Text that neither breaks the table nor is taken for markup."""
    return text.translate(_AS_TEXT) or "*(empty)*"

"""`RewardDivergence`: warns when a part of the reward rises while correctness falls (reward hacking)."""

import math
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hybrid_lightning.errors import ConfigError


class RewardDivergence(Callback):
    """Compares the older with the newer half of the last rollouts, and warns once for each part of the reward.

    For example, a reward of 0.1 for ending a completion can make a policy end at once: the reward rises, the accuracy falls.

    Args:
        window: Number of rollouts that are compared; an even number.
        standard_errors: How many standard errors both changes must have.
    """

    def __init__(self, window: int = 20, standard_errors: float = 2.0) -> None:
        if window < 4 or window % 2:
            raise ConfigError(f"divergence.window must be an even number of at least 4, got {window}")
        if not standard_errors > 0:
            raise ConfigError(f"divergence.standard_errors must be positive, got {standard_errors}")
        self.window, self.standard_errors = window, standard_errors
        self._history: deque[dict[str, float]] = deque(maxlen=window)
        self._warned: set[str] = set()
        self._last: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the rollout of the batch, once for each rollout."""
        rollout = getattr(pl_module, "last_rollout", None)
        if rollout is None or rollout is self._last:
            return
        self._last = rollout
        rewards = rollout[1]
        means = {f"rewards/{name}": float(part.mean()) for name, part in rewards.parts.items()}
        self._history.append({"accuracy": float(rewards.correct.float().mean()), **means})
        for name in self.diverging():
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"{name} rose while the share of correct completions fell over the last {self.window} rollouts (step "
                    f"{trainer.global_step}): the policy may be exploiting this part of the reward; lower its weight or remove it"
                )

    def state_dict(self) -> dict[str, Any]:
        """The history, so that a resumed run warns where a run that was not stopped would."""
        return {"history": list(self._history), "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self._history.extend(state_dict["history"])  # if the window is smaller now, the newest entries stay
        self._warned.update(state_dict["warned"])

    def diverging(self) -> list[str]:
        """Parts of the reward that rise while the accuracy falls, over the last `window` rollouts."""
        if len(self._history) < self.window:
            return []
        if self._change("accuracy") > -self.standard_errors:
            return []
        return [name for name in self._history[-1] if name != "accuracy" and self._change(name) >= self.standard_errors]

    def _change(self, name: str) -> float:
        """Change of a value from the older to the newer half, in standard errors."""
        values = [entry.get(name, 0.0) for entry in self._history]
        half = self.window // 2
        (old, old_error), (new, new_error) = _mean_and_error(values[:half]), _mean_and_error(values[half:])
        if new == old:
            return 0.0
        error = math.hypot(old_error, new_error)
        return (new - old) / error if error > 0 else math.copysign(math.inf, new - old)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

"""Scorers: how sensitive a module is to being trained at low rank only. A scorer of your own is one more class.

The public text of Hybrid-LoRA (arXiv 2605.18822) gives the idea, a module's sensitivity to low-rank adaptation under a fixed
budget, but not the formula: the definitions below are this project's own. G is the gradient of the training objective at the
start policy, averaged over calibration rollouts, and sigma_i its singular values. To first order, a full-rank step along -G
gains ||G||_F^2, and the best step of rank r gains the sum of the first r sigma_i(G)^2.

- `TailEnergy` and `TailFraction`: the part of G that LoRA of rank r cannot express, T_r(G) = ||G||_F^2 - sum_{i<=r} sigma_i(G)^2,
  and its share tau_r(G) = T_r(G) / ||G||_F^2.
- `PreconditionedTail`: the tail of the step that Adam would take. Adam divides the gradient by the root of its second moment,
  which at the first step is the square of that gradient: a module's step has the same size however large its gradient is, and
  what then counts is how many directions the step has. A second moment of rank one, as Adafactor keeps it (Shazeer and Stern
  2018, arXiv 1804.04235), preserves how the entries compare: with u the mean squares of G's rows, v those of its columns and s
  the mean square of all entries, P = diag(u)^(-1/2) G diag(v)^(-1/2) s^(1/2), and the score is T_r(P). It depends on the mean
  gradient alone, so it is the same however the calibration rollouts are split into micro-batches.
- `SpectrumSNR`: signal in the tail against the sampling noise of the calibration rollouts. Noise looks full-rank, so a plain tail
  energy mistakes noise for a need of full training. Let D be the difference of the mean gradients of even and odd micro-batches,
  scaled (by 1/2, if there are as many of each) so that it has the noise of G and none of its signal. Then T_r(D) is the part of
  T_r(G) that noise alone would make, and the score is max(T_r(G) - T_r(D), 0) / (T_r(G) + T_r(D)). With the signal-to-noise ratio
  x = T_r(G) / T_r(D) that is (x - 1) / (x + 1): it grows with x, and stays finite without noise.
- `Probe`: measured, not derived. With t = step * ||W||_F / ||G||_F and G_r the best rank-r approximation of G (its truncated
  singular value decomposition), the score is loss(W - t G_r) - loss(W - t G): what the calibration loss gains if the step is
  not restricted to rank r. For small steps this is t T_r(G).
- `UpdateTail`: what several optimizer steps would change, D, instead of one gradient: T_t(D), or that per parameter. Only over
  steps does the optimizer tell a direction in which gradients agree from one in which they don't (see updates.py). t is a rank of
  its own, 8 by default, since rank 2 told modules of equal size apart worse in the project's study.
- `GradientNorm` and `WeightGradient`: baselines that ignore the rank. `Random`: chance, which every other scorer has to beat.
"""

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from hybrid_lightning.adapters.spectra import best_low_rank
from hybrid_lightning.adapters.statistics import ModuleStatistics, require
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError

__all__ = [
    "GradientNorm",
    "PreconditionedTail",
    "Probe",
    "Random",
    "Scorer",
    "SpectrumSNR",
    "TailEnergy",
    "TailFraction",
    "UpdateTail",
    "WeightGradient",
]


class Scorer(Configurable, ABC):
    """Turns the calibration statistics of one module into a number; modules with the highest scores are fully trained.

    A scorer of your own is a subclass, which a config names by its `class_path`. The class attributes say which statistics to
    collect, and whether several modules may be scored at a time.

    Example:
        >>> class LargestSingularValue(Scorer):
        ...     def score(self, statistics: ModuleStatistics, rank: int) -> float:
        ...         return float(statistics.gradient.spectrum()[0])
    """

    needs_gradient: ClassVar[bool] = True  # reads `statistics.gradient`; if False there is no calibration pass
    needs_halves: ClassVar[bool] = False  # reads `statistics.noise`
    needs_loss: ClassVar[bool] = False  # calls `statistics.evaluate_loss`
    needs_update: ClassVar[bool] = False  # reads `statistics.update`, of as many optimizer steps as its `steps` says
    steps: int = 0  # optimizer steps of an update
    concurrent: ClassVar[bool] = False  # `score` changes nothing, so it may run on several threads

    @property
    def needs_calibration(self) -> bool:
        """Whether losses of the start policy are needed, and not the weights alone."""
        return self.needs_gradient or self.needs_loss or self.needs_update

    @abstractmethod
    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        """Score one module.

        Args:
            statistics: What is known of that module.
            rank: LoRA rank r; 0 for a module that would have no LoRA.

        Returns:
            A finite number; higher is more sensitive to low-rank adaptation.
        """


class TailEnergy(Scorer):
    """Tail energy T_r(G): what rank r loses to first order, in the unit in which modules compare under plain gradient descent."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return require(statistics.gradient, "the gradient", self).tail_energy(rank)


class TailFraction(Scorer):
    """Tail fraction tau_r(G), the tail as a share of all energy: scale-free, between 0 and 1; 0 for a zero gradient."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self)
        energy = gradient.energy()
        return min(gradient.tail_energy(rank) / energy, 1.0) if energy > 0 else 0.0


class PreconditionedTail(Scorer):
    """Tail energy T_r(P) of Adam's step, the default; works with sketches too."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return require(statistics.gradient, "the gradient", self).preconditioned().tail_energy(rank)


class UpdateTail(Scorer):
    """Tail energy T_t(D) of what the first optimizer steps would change, with the run's own loss, data and optimizer.

    No step is taken: the gradients are those of the start policy. The rollouts are those of as many steps of training, and each
    turn of candidates takes the gradients of all of them.

    Args:
        steps: Optimizer steps.
        tail_rank: Rank t beyond which directions count.
        per_parameter: Divide by the number of parameters, so that modules of different sizes compare.

    Raises:
        ConfigError: If a value is impossible.
    """

    needs_gradient = False
    needs_update = True

    def __init__(self, steps: int = 8, tail_rank: int = 8, per_parameter: bool = False) -> None:
        if steps < 1:
            raise ConfigError(f"steps={steps}; give at least one optimizer step; 8 are good")
        if tail_rank < 0:
            raise ConfigError(f"tail_rank={tail_rank}; give 0 or more; 8 is good")
        self.steps, self.tail_rank, self.per_parameter = steps, tail_rank, per_parameter

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        tail = require(statistics.update, "the update", self).tail_energy(self.tail_rank)
        return tail / statistics.parameters if self.per_parameter else tail


class GradientNorm(Scorer):
    """Frobenius norm of the mean gradient, ||G||_F."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return max(require(statistics.gradient, "the gradient", self).energy(), 0.0) ** 0.5


class WeightGradient(Scorer):
    """Saliency known from pruning, summed over the module: sum_ij |W_ij G_ij|.

    To first order, how much the loss moves if each weight changes by its own size. Needs whole gradients (`ExactGradients`).
    """

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self).matrix().double()
        return float((statistics.weight.to(gradient) * gradient).abs().sum())


class SpectrumSNR(Scorer):
    """Signal-to-noise score of the tail, between 0 (all noise) and 1 (no noise); needs at least two calibration losses."""

    needs_halves = True
    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        whole = require(statistics.gradient, "the gradient", self).tail_energy(rank)
        noise = require(statistics.noise, "the split halves", self).tail_energy(rank)
        return max(whole - noise, 0.0) / (whole + noise) if whole + noise > 0 else 0.0


class Probe(Scorer):
    """Measured gain of a full-rank step over a rank-r step; evaluates the calibration loss twice per module.

    The weights are restored bit for bit. Needs whole gradients (`ExactGradients`).

    Args:
        step: Length of the full-rank step, relative to the norm of the weight.
    """

    needs_loss = True

    def __init__(self, step: float = 0.01) -> None:
        if not step > 0:
            raise ConfigError(f"step={step}; give a positive fraction of the weight's norm, such as 0.01")
        self.step = step

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self).matrix()
        evaluate_loss = require(statistics.evaluate_loss, "evaluate_loss", self)
        norm = float(gradient.double().norm())
        if norm == 0 or rank >= min(gradient.shape):
            return 0.0
        weight = statistics.weight
        length = self.step * float(weight.double().norm()) / norm
        start = weight.clone()
        losses = []
        with torch.no_grad():
            for direction in (best_low_rank(gradient, rank), gradient):
                try:
                    weight.copy_(start.double() - length * direction.to(start.device, torch.float64))
                    losses.append(float(evaluate_loss()))
                finally:
                    weight.copy_(start)
        return losses[0] - losses[1]


class Random(Scorer):
    """Uniform random score between 0 and 1, determined by the seed and the module's name; needs no calibration.

    Args:
        seed: Another seed chooses other modules.
    """

    needs_gradient = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        digest = hashlib.sha256(f"{self.seed} {statistics.name}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

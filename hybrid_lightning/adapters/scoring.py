"""`Scoring`: the scores of a model's candidate modules.

    losses -> sums of gradients -> one number for each module

The gradients of all losses are added up module by module (`gradients.py`), and the scorer (`scorers.py`) turns a module's
statistics into one number. Ranks that have split the model share the work (`training/sharded_scoring.py`).

This file and the scorers need only torch.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.gradients import (
    ExactGradients,
    Gradient,
    GradientMode,
    GradientOfExperts,
    GradientSum,
    matrices_of,
)
from hybrid_lightning.adapters.scorers import ModuleStatistics, Scorer
from hybrid_lightning.adapters.spectra import ONE_THREAD_UP_TO, map_on_workers
from hybrid_lightning.errors import CalibrationError, ConfigError

Result = TypeVar("Result")


class Scoring:
    """Scores each candidate's sensitivity to low-rank adaptation.

    Args:
        model: The start policy, with floating-point weights. Afterwards it is unchanged, including modes and `requires_grad`.
        candidates: Full dotted name -> module, as from `find_candidates`.
        losses: Scalar calibration losses, each with the same weight. Compute each one during the iteration (a generator), so that
            its backward pass frees its graph before the next. Not used if the scorer needs only the weights.
        scorer: Defines the score.
        rank: LoRA rank r, of all candidates or of each by its name; 0 for a candidate that would have no LoRA.
        gradients: How gradients are kept; None takes `ExactGradients()`.
        loss_scale: Factor of the losses in backward passes. In float16, gradients below 6e-8 would otherwise become 0.

    Raises:
        ConfigError: If no rank is positive.

    Example:
        >>> from hybrid_lightning.adapters import TailFraction, find_candidates
        >>> block = nn.Module()
        >>> block.layers = nn.ModuleList([nn.Linear(4, 4)])
        >>> losses = (block.layers[0](torch.eye(4)).square().sum() for _ in range(1))
        >>> scores = Scoring(block, find_candidates(block), losses, TailFraction(), rank=1).run()
        >>> list(scores), 0 <= scores["layers.0"] <= 1
        (['layers.0'], True)
    """

    prints = True  # whether this process warns; only one of several does

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Module],
        losses: Iterable[Tensor],
        scorer: Scorer,
        rank: int | Mapping[str, int],
        gradients: GradientMode | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self._lora_ranks = {name: rank if isinstance(rank, int) else rank[name] for name in candidates}
        if max(self._lora_ranks.values(), default=0) < 1:
            raise ConfigError(
                f"rank={max(self._lora_ranks.values(), default=0)} leaves nothing to score; give a LoRA rank of at least 1"
            )
        self._model, self._candidates, self._losses, self._scorer = model, candidates, losses, scorer
        self._gradients, self._loss_scale = gradients or ExactGradients(), loss_scale
        self._sums: dict[str, GradientSum] = {}  # for the matrices of this process, until they are scored
        self._seen = 0  # losses in these sums
        self._unused: Collection[str] = ()  # matrices without gradient, on any process

    def run(self, on_loss: Callable[[int], None] = lambda seen: None) -> dict[str, float]:
        """Score the modules.

        A candidate that no loss used has no gradient: it scores 0, with a warning. Experts that received no token add nothing to
        the score of their layer, with a warning.

        Args:
            on_loss: Called after each loss with the number of losses seen so far.

        Returns:
            Full dotted name -> score, in the order of the candidates; higher is more sensitive.

        Raises:
            CalibrationError: If the losses carry no signal, or a loss, a gradient or a score is not finite.
            ConfigError: If the scorer needs something that is not kept.
        """
        if self._scorer.needs_gradient:
            self.collect_gradients(on_loss)
            self._check_signal()
        scores = self.together(lambda: self._scores(self.own()))
        return {name: scores[name] for name in self._candidates}

    # ---- steps that differ when several ranks score together

    def own(self) -> Sequence[str]:
        """Names of the candidates that this process scores."""
        return list(self._candidates)

    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that the passes go through, by the names of the candidates."""
        return self._candidates

    def together(self, function: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """Call a function on each process and merge the results; an error on one process is raised on all."""
        return function()

    def backward_all(self) -> Iterator[int]:
        """Run the backward pass of each loss, and free each gradient once it is added. Yields the number of losses so far."""

        def take(name: str, part: str) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                assert weight.grad is not None
                self.add(name, part, weight.grad.detach())
                weight.grad = None

            return hook

        handles = [
            weight.register_post_accumulate_grad_hook(take(name, part))
            for name, module in self.modules().items()
            for part, weight in matrices_of(module).items()
        ]
        try:
            for index, loss in enumerate(self._losses):
                self.check_loss(loss, index)
                self.differentiate(loss)
                yield index + 1
        finally:
            for handle in handles:
                handle.remove()

    # ---- collecting gradients

    def collect_gradients(self, on_loss: Callable[[int], None]) -> Mapping[str, GradientSum]:
        """Add up the gradients of all losses, by the name of each module that this process scores, and of each of its experts.

        Meanwhile the model is in eval mode (no dropout). transformers does gradient checkpointing in train mode only, so blocks
        with gradient checkpointing are put in train mode themselves, but not the modules inside them, which hold the dropout.
        """
        modules = self.modules()
        for name in self.own():
            for part, weight in matrices_of(modules[name]).items():
                # Its values may be split over ranks, and are not read.
                like = weight if weight.dim() == 2 else torch.empty(weight.shape[1:], dtype=weight.dtype, device=weight.device)
                for key in _keys(name, part, weight):
                    self._sums[key] = self._gradients.new_sum(key, like, self._lora_ranks[name])
        with _only_candidates_trainable(self._model, modules), torch.enable_grad():
            for seen in self.backward_all():
                self._seen = seen
                on_loss(seen)
        return self._sums

    def check_loss(self, loss: Tensor, index: int) -> None:
        """Raise CalibrationError if a loss is not finite."""
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"calibration loss {index} is {loss.item()}; look for inf or nan in the calibration data, or use bfloat16 "
                "or float32 instead of float16"
            )

    def differentiate(self, loss: Tensor) -> None:
        """Run the backward pass of a scaled loss; `add` removes the scale."""
        scaled = loss if self._loss_scale == 1 else loss * self._loss_scale
        scaled.backward()  # type: ignore[no-untyped-call]

    def add(self, name: str, part: str, gradient: Tensor) -> None:
        """Add a gradient, [m, n] or [experts, m, n], of a weight of a module that this process scores."""
        # Losses may be yielded from within autocast, but sums and sketches are float32.
        with torch.autocast(gradient.device.type, enabled=False):
            for key, matrix in zip(_keys(name, part, gradient), gradient if gradient.dim() == 3 else [gradient], strict=True):
                self._sums[key].add(matrix if self._loss_scale == 1 else matrix.float() / self._loss_scale)

    def _check_signal(self) -> None:
        def without_gradient() -> dict[str, None]:
            for name, total in self._sums.items():
                if not total.is_finite():
                    raise CalibrationError(
                        f"the calibration gradient of {name} is not finite; use bfloat16 or float32 for scoring, or look for "
                        "inf or nan in the calibration data"
                    )
            return {name: None for name, total in self._sums.items() if total.is_zero()}

        self._unused = self.together(without_gradient)
        modules = {name: self._keys(name) for name in self._candidates}
        unused = [name for name, keys in modules.items() if all(key in self._unused for key in keys)]
        if len(unused) == len(modules):
            raise CalibrationError(
                f"the calibration gradient is zero in all {len(unused)} candidate modules, for example because all rewards of "
                "each prompt are equal; use more prompts, prompts that are sometimes solved, more samples per prompt, or "
                "reference answers"
            )
        if unused and self.prints:
            warnings.warn(
                f"{len(unused)} of {len(modules)} candidate modules got no gradient from the calibration losses and "
                f"score 0 (such as {unused[0]}); calibrate with more rollouts if they matter",
                stacklevel=3,
            )
        experts = [key for name, keys in modules.items() if len(keys) > 1 and name not in unused for key in keys]
        without = [key for key in experts if key in self._unused]
        if without and self.prints:
            warnings.warn(
                f"{len(without)} of {len(experts)} matrices of experts got no token from the calibration losses and add nothing "
                f"to the score of their layer (such as {without[0]}); calibrate with more rollouts if they matter",
                stacklevel=3,
            )

    # ---- scoring

    def _scores(self, names: Sequence[str]) -> dict[str, float]:
        """The scores of some modules; modules with small gradients come first, side by side where the scorer allows that."""
        small: list[str] = []
        if self._scorer.concurrent:
            # Small enough for one thread, and for a float64 copy on each thread.
            small = [name for name in names if all(self._is_small(key) for key in self._keys(name))]
        scores = dict(zip(small, map_on_workers(self._score, small), strict=True))
        return scores | {name: self._score(name) for name in names if name not in scores}

    def _score(self, name: str) -> float:
        """The score of one module; frees its sums."""
        module, scorer, keys = self._candidates[name], self._scorer, self._keys(name)
        sums = [self._sums.pop(key) for key in keys if key in self._sums]
        if all(key in self._unused for key in keys):
            return 0.0
        gradient: Gradient | None = None
        if len(keys) > 1:
            gradient = GradientOfExperts(lambda: (total.mean(self._seen) for total in sums))
        elif sums:
            gradient = sums[0].mean(self._seen)
        statistics = ModuleStatistics(
            name=name,
            weight=next(iter(matrices_of(module).values())).detach(),
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            gradient=gradient,
        )
        number = float(scorer.score(statistics, self._lora_ranks[name]))
        if not math.isfinite(number):
            raise CalibrationError(f"{type(scorer).__name__} gave {name} the score {number}; a score must be finite")
        return number

    def _keys(self, name: str) -> list[str]:
        """Names of the matrices of a candidate: its own, or one for each expert."""
        parts = matrices_of(self._candidates[name]).items()
        return [key for part, weight in parts for key in _keys(name, part, weight)]

    def _is_small(self, key: str) -> bool:
        total = self._sums.get(key)
        return total is not None and total.on_cpu and min(total.shape) <= ONE_THREAD_UP_TO


def _keys(name: str, part: str, weight: Tensor) -> list[str]:
    """Name of each matrix [m, n] in a weight: one, or one for each expert."""
    return [name] if weight.dim() == 2 else [f"{name}.{number}.{part}" for number in range(len(weight))]


@contextmanager
def _only_candidates_trainable(model: nn.Module, candidates: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this context only the candidates' weights get gradients, and the model is in eval mode (see `collect_gradients`)."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in candidates.values():
            for weight in matrices_of(module).values():
                weight.requires_grad_(True)
        for module, _ in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training

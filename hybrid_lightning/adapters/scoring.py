"""`Scoring`: the scores of a model's candidate modules.

    losses -> gradients, or the steps that an optimizer would make -> one number for each module

Gradients of all losses are added up module by module (`gradients.py`), or optimizer steps are (`updates.py`). The scorer
(`scorers.py`) makes one number of what is known of a module (`statistics.py`). Scores, and the sums before them, are saved as
they are made (`scoring_progress.py`). One process does all of it, or several share it (`scoring_process.py`).

This file and the scorers need only torch.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.gradients import ExactGradients, GradientMode, ModuleAccumulator
from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.adapters.scoring_process import CalibrationState, ScoringProcess, check_weight, only_candidates_trainable
from hybrid_lightning.adapters.spectra import ONE_THREAD_UP_TO, map_on_workers
from hybrid_lightning.adapters.statistics import Gradient, ModuleStatistics
from hybrid_lightning.adapters.updates import OptimizerSteps, updates_in_turns
from hybrid_lightning.errors import CalibrationError, ConfigError
from hybrid_lightning.stopping import RunStopped


class Scoring:
    """Scores each candidate's sensitivity to low-rank adaptation.

    Args:
        model: The start policy, with floating-point weights; unchanged afterwards, its modes and `requires_grad` flags included.
        candidates: Full dotted name -> linear module, as from `find_candidates`.
        losses: Scalar calibration losses, each with the same weight. They have to be computed lazily, while they are iterated
            over: the backward pass of each frees its graph. Scorers of updates and `Probe` iterate over them several times. Not
            used if the scorer needs the weights alone.
        scorer: Defines the score.
        rank: LoRA rank r, of all candidates or of each by its name; 0 for one that would have no LoRA.
        gradients: How gradients are kept; None takes `ExactGradients()`.
        steps: The optimizer whose steps make an update, and how many weights a turn has; needed by scorers of updates only.

    Raises:
        ConfigError: If no rank is positive, or the scorer needs `steps`.

    Example:
        >>> from hybrid_lightning.adapters import TailFraction, find_candidates
        >>> block = nn.Module()
        >>> block.layers = nn.ModuleList([nn.Linear(4, 4)])
        >>> losses = (block.layers[0](torch.eye(4)).square().sum() for _ in range(1))
        >>> scores = Scoring(block, find_candidates(block), losses, TailFraction(), rank=1).run()
        >>> list(scores), 0 <= scores["layers.0"] <= 1
        (['layers.0'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Module],
        losses: Iterable[Tensor],
        scorer: Scorer,
        rank: int | Mapping[str, int],
        gradients: GradientMode | None = None,
        steps: OptimizerSteps | None = None,
    ) -> None:
        self._ranks = {name: rank if isinstance(rank, int) else rank[name] for name in candidates}
        if max(self._ranks.values(), default=0) < 1:
            raise ConfigError(
                f"rank={max(self._ranks.values(), default=0)} leaves nothing to score; give a LoRA rank of at least 1"
            )
        if scorer.needs_update and steps is None:
            raise ConfigError(f"{type(scorer).__name__} needs steps, the optimizer whose steps it looks at; give it too")
        self._model, self._candidates, self._losses, self._scorer = model, candidates, losses, scorer
        self._gradients, self._steps = gradients or ExactGradients(), steps
        self._process = ScoringProcess()
        self._sums: dict[str, ModuleAccumulator] = {}  # of the modules that this process scores, until they are scored
        self._seen = 0  # losses in these sums

    def run(self, process: ScoringProcess | None = None) -> dict[str, float]:
        """Score the modules; those that have a score in the saved progress are not scored again.

        A candidate that no loss used, such as an expert that got no token, has no gradient: it scores 0, with a warning.

        Args:
            process: Has the saved progress, and shares the work with other processes, all of which get all scores. None: this
                process is alone and saves nothing.

        Returns:
            Full dotted name -> score, in the order of the candidates; higher is more sensitive.

        Raises:
            ModelError: If a weight cannot have a gradient, as in a quantized model.
            CalibrationError: If the losses carry no signal, or a loss, a gradient or a score is not finite.
            ConfigError: If the scorer returns no number, or needs what is not kept.
            RunStopped: If a signal stops the run; what has been computed is saved before.
        """
        self._process = process or ScoringProcess()
        progress = self._process.progress
        try:
            if self._scorer.needs_gradient and self._unscored():
                self.collect_gradients()
            self._score_small()
            if self._scorer.needs_update:
                self._score_updates()
            for names in self._process.rounds(self._unscored()):
                progress.keep_scores(self._scores_of(names))
                self._forget(names)
        except RunStopped:
            self._save(stopped=True)
            raise
        progress.keep_scores({}, last=True)
        return {name: progress.scores[name] for name in self._candidates}

    # ---- collecting gradients

    def collect_gradients(self) -> Mapping[str, ModuleAccumulator]:
        """Add up the gradients of all losses, by the name of each module without a score that this process scores.

        Meanwhile the model is in eval mode (no dropout). transformers does gradient checkpointing in train mode only, so blocks
        with gradient checkpointing are put in train mode themselves, but not the modules inside them, which hold the dropout.
        Losses in the saved sums of a stopped run are skipped if they follow `CalibrationState`; others are computed again,
        without a backward pass.
        """
        process, unscored = self._process, self._unscored()
        for name, module in self._candidates.items():
            check_weight(name, module)
        modules = process.modules(self._candidates)
        for name in process.own(unscored):
            weight: Tensor = modules[name].weight  # type: ignore[assignment]
            form = self._gradients.form(name, weight, self._ranks[name])
            self._sums[name] = ModuleAccumulator(form, (weight.shape[0], weight.shape[1]), self._scorer.needs_halves)
        self._restore()
        with only_candidates_trainable(self._model, modules), torch.enable_grad():
            for seen in process.backward_all(self._candidates, self._add, self._losses, self._seen):
                self._seen = seen
                process.on_loss(seen)
                self._save()
        for sums in self._sums.values():
            sums.count_losses(self._seen)
        self._check_signal(len(unscored))
        return self._sums

    def _add(self, name: str, gradient: Tensor, index: int) -> None:
        if name in self._sums:
            self._sums[name].add(gradient, index)

    def _unscored(self) -> list[str]:
        return [name for name in self._candidates if name not in self._process.progress.scores]

    def _save(self, stopped: bool = False) -> None:
        """Save the sums of modules without a score, and the state that the remaining losses need, if saving is due."""

        def state() -> dict[str, Any]:
            sums = {name: self._sums[name].tensors() for name in self._unscored() if name in self._sums}
            losses = self._losses.state_dict() if isinstance(self._losses, CalibrationState) else {}
            return {"seen": self._seen, "sums": sums, "losses": losses}

        self._process.progress.keep_sums(state, stopped)

    def _restore(self) -> None:
        """Restore the sums of a stopped run, and the state of the losses after those in the sums."""
        state = self._process.progress.sums()
        if state is None:
            return
        if isinstance(self._losses, CalibrationState):
            self._losses.load_state_dict(state["losses"])
        for name, sums in self._sums.items():
            for tensor, value in zip(sums.tensors(), state["sums"][name], strict=True):
                tensor.copy_(value)
        self._seen = int(state["seen"])

    def _check_signal(self, candidates: int) -> None:
        if not self._seen:
            raise CalibrationError("there are no calibration losses or no candidates; give at least one of each")

        def without_gradient() -> dict[str, None]:
            for name, sums in self._sums.items():
                if not all(bool(torch.isfinite(tensor).all()) for tensor in sums.tensors()):
                    raise CalibrationError(
                        f"the calibration gradient of {name} is not finite; use bfloat16 or float32 for scoring, or look for "
                        "inf or nan in the calibration data"
                    )
            return {name: None for name, sums in self._sums.items() if not sums.received}

        unused = list(self._process.together(without_gradient))
        if not self._process.any(any(sums.has_signal() for sums in self._sums.values())):
            raise CalibrationError(
                f"the calibration gradient is zero in all {candidates} candidate modules, as when all rewards of each prompt are "
                "equal; use more prompts, prompts that are solved sometimes, more samples per prompt, or reference answers"
            )
        if unused and self._process.is_first:
            warnings.warn(
                f"{len(unused)} of {len(self._candidates)} candidate modules got no gradient from the calibration losses and "
                f"score 0 (such as {unused[0]}); calibrate with more rollouts if they matter",
                stacklevel=4,
            )

    # ---- scoring

    def _score_small(self) -> None:
        """Score the modules whose gradients are small side by side, where the scorer allows that."""
        scorer = self._scorer
        if not scorer.concurrent or scorer.needs_update or scorer.needs_loss:
            return
        # So small that one thread is enough, and that a float64 copy on each thread takes little memory too.
        small = [name for name, sums in self._sums.items() if sums.on_cpu and min(sums.shape) <= ONE_THREAD_UP_TO]
        scores = self._process.together(lambda: dict(zip(small, map_on_workers(self._score, small), strict=True)))
        self._process.progress.keep_scores(scores)
        self._forget(small)

    def _score_updates(self) -> None:
        """Score turn by turn, so that no two turns' updates are in memory together."""
        assert self._steps is not None
        process = self._process
        rest = {name: self._candidates[name] for name in self._unscored()}
        moved = len(rest) < len(self._candidates)  # a stopped run has kept no score before a module was moved
        found: dict[str, float] = {}
        for updates in updates_in_turns(self._model, rest, self._losses, self._steps, process):
            found |= self._scores_of(process.together(partial(dict.fromkeys, updates)), updates)
            moved = moved or process.any(any(update.energy() > 0 for update in updates.values()))
            if moved:
                process.progress.keep_scores(found)
                found = {}
        if not moved:
            raise CalibrationError(
                f"the optimizer would move none of {len(rest)} candidate modules, as when all rewards of each prompt are equal, "
                "or with a learning rate of 0; use prompts that are solved sometimes, more samples per prompt, or a positive "
                "model.lr_full"
            )

    def _scores_of(self, names: Iterable[str], updates: Mapping[str, Gradient] | None = None) -> dict[str, float]:
        """The scores of some candidates, of which this process scores its own, by their updates where there are such."""
        updates, process = updates or {}, self._process
        if not self._scorer.needs_loss:
            return process.together(lambda: {name: self._score(name, updates.get(name)) for name in process.own(names)})
        found: dict[str, float] = {}
        for name in names:  # one after the other, since the weights of one are changed meanwhile
            found |= process.measure(name, self._candidates[name], partial(self._score, name, updates.get(name)), self._losses)
        return found

    def _score(
        self, name: str, update: Gradient | None = None, weight: Tensor | None = None, loss: Callable[[], float] | None = None
    ) -> float:
        """The score of one module, by its update for a scorer of updates.

        A scorer that needs the loss may change the weight [m, n], and measures the mean loss with it; None is the module's own.
        """
        sums, module, scorer = self._sums.get(name), self._candidates[name], self._scorer
        if sums is not None and not sums.received:
            return 0.0
        statistics = ModuleStatistics(
            name=name,
            weight=self._process.weight(name, module) if weight is None else weight,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            gradient=sums.mean() if sums else None,
            noise=sums.noise() if sums and scorer.needs_halves else None,
            update=update,
            evaluate_loss=loss,
        )
        value = scorer.score(statistics, self._ranks[name])
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(scorer).__name__}.score returned {value!r:.60} for {name}; return a number") from error
        if not math.isfinite(number):
            raise CalibrationError(f"{type(scorer).__name__} gave {name} the score {number}; a score must be finite")
        return number

    def _forget(self, names: Iterable[str]) -> None:
        """Free the sums of modules that have a score."""
        for name in names:
            self._sums.pop(name, None)

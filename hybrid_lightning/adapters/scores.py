"""Score all candidates: one calibration pass, then one number for each module.

This file and the scorers need only torch.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.gradients import ExactGradients, GradientMode, ModuleAccumulator, collect_gradients, save_progress
from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.adapters.spectra import ONE_THREAD_UP_TO
from hybrid_lightning.adapters.statistics import Gradient, ModuleStatistics
from hybrid_lightning.adapters.updates import OptimizerSteps, updates_in_turns
from hybrid_lightning.errors import CalibrationError, ConfigError
from hybrid_lightning.stopping import RunStopped

In = TypeVar("In")
Out = TypeVar("Out")
MAX_WORKERS = 16  # threads; each holds a float64 copy of its matrix


def score_modules(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    scorer: Scorer,
    rank: int | Mapping[str, int],
    mode: GradientMode | None = None,
    evaluate_loss: Callable[[], float] | None = None,
    kept: ScoringProgress | None = None,
    on_loss: Callable[[int], None] | None = None,
    steps: OptimizerSteps | None = None,
    process: ScoringProcess | None = None,
) -> dict[str, float]:
    """Score each candidate's sensitivity to low-rank adaptation.

    A candidate that no calibration loss used (such as an expert that got no token) has no gradient: it scores 0, with a warning.

    Args:
        model: The start policy; unchanged afterwards.
        candidates: Full dotted name -> linear module, as from `find_candidates`.
        losses: Scalar calibration losses, iterated over lazily (see `collect_gradients`); not used if the scorer needs no
            gradient.
        scorer: Defines the score.
        rank: LoRA rank r, of all candidates or of each by its name; 0 for one that would have no LoRA.
        mode: How gradients are kept, `ExactGradients()` (the default) or `SketchedGradients()`.
        evaluate_loss: Measures the calibration loss at the model's current weights; needed by `Probe` only.
        kept: Saved progress of scoring: the scores in it are not computed again, and new ones are saved in it. None saves
            nothing.
        on_loss: See `collect_gradients`; of a scorer of updates, over all turns.
        steps: The optimizer whose steps make an update, and how many weights a turn has; needed by scorers of updates only.
        process: Shares the work with other processes, all of which get all scores; None: this one is alone.

    Returns:
        Full dotted name -> score; higher is more sensitive.

    Raises:
        ConfigError: If no rank is positive, the scorer needs what is missing, or it returns no number.
        CalibrationError: If the losses carry no signal, or a score is not finite.
    """
    ranks = dict.fromkeys(candidates, rank) if isinstance(rank, int) else {name: rank[name] for name in candidates}
    if max(ranks.values(), default=0) < 1:
        raise ConfigError(f"rank={max(ranks.values(), default=0)}: scoring needs a LoRA rank of at least 1.")
    if scorer.needs_loss and evaluate_loss is None:
        raise ConfigError(f"{type(scorer).__name__} needs evaluate_loss, which measures the calibration loss: give it too.")
    if scorer.needs_update and steps is None:
        raise ConfigError(f"{type(scorer).__name__} needs steps, the optimizer whose steps it looks at: give it too.")
    kept, process = kept or ScoringProgress(), process or ScoringProcess()
    collected: dict[str, ModuleAccumulator] = {}
    if scorer.needs_gradient:
        collected = collect_gradients(
            model,
            candidates,
            losses,
            ExactGradients() if mode is None else mode,
            ranks,
            halves=scorer.needs_halves,
            kept=kept,
            on_loss=on_loss,
            process=process,
        )
    _warn_unused(collected, len(candidates), process)

    def score(
        name: str, update: Gradient | None = None, weight: Tensor | None = None, loss: Callable[[], float] | None = None
    ) -> float:
        accumulator = collected.get(name)
        if accumulator is not None and not accumulator.received:
            return 0.0
        weight = process.weight(name, candidates[name]) if weight is None else weight
        parameters = sum(parameter.numel() for parameter in candidates[name].parameters())
        value = scorer.score(_statistics(name, weight, parameters, accumulator, scorer, loss, update), ranks[name])
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(scorer).__name__}.score returned {value!r:.60} for {name}: return a number") from error
        if not math.isfinite(number):
            raise CalibrationError(f"{type(scorer).__name__} gave {name} the score {number}: a score must be finite.")
        return number

    seen = int(next((accumulator.losses.sum() for accumulator in collected.values()), 0))

    def scores_of(names: Iterable[str], updates: Mapping[str, Gradient] | None = None) -> dict[str, float]:
        """Of candidates of which this process scores some, by their updates where there are such."""
        updates, own = updates or {}, process.own(names)
        if not scorer.needs_loss:
            return process.together(lambda: {name: score(name, updates.get(name)) for name in own})
        found: dict[str, float] = {}
        for name in names:  # one after the other, since the weights of one are changed meanwhile
            found |= process.measure(name, candidates[name], partial(score, name, updates.get(name)), evaluate_loss, losses)
        return found

    def score_all() -> None:
        concurrent = scorer.concurrent and not scorer.needs_update and not scorer.needs_loss
        small = [name for name in collected if concurrent and _small_on_cpu(collected[name])]
        kept.keep_scores(process.together(lambda: dict(zip(small, map_on_workers(score, small), strict=True))))
        if steps is not None and scorer.needs_update:
            _keep_scores_of_updates(model, candidates, losses, steps, kept, scores_of, on_loss, process)
        for name in small:
            del collected[name]  # frees the module's sums once it is scored
        for names in process.rounds([name for name in candidates if name not in kept.scores]):
            kept.keep_scores(scores_of(names))
            for name in process.own(names):
                collected.pop(name, None)

    try:
        score_all()
    except RunStopped:
        save_progress(
            kept, {name: sums for name, sums in collected.items() if name not in kept.scores}, losses, seen, stopped=True
        )
        raise
    kept.keep_scores({}, last=True)
    return {name: kept.scores[name] for name in candidates}


def map_on_workers(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """Call a function for each item, on as many threads as torch may use.

    Many small decompositions run faster side by side than one after another on LAPACK's own threads, from which LAPACK gains
    little. Within the function torch uses one thread, so that results do not depend on the number of threads. torch releases
    the interpreter's lock meanwhile. After the first error no further call is started.

    Args:
        function: Safe to call from several threads.
        items: Its arguments, one for each call.

    Returns:
        The results, in the order of the items.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MAX_WORKERS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)  # the workers have also set what later threads would start with


def _keep_scores_of_updates(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    steps: OptimizerSteps,
    kept: ScoringProgress,
    scores_of: Callable[[Iterable[str], Mapping[str, Gradient]], dict[str, float]],
    on_loss: Callable[[int], None] | None,
    process: ScoringProcess,
) -> None:
    """Score turn by turn, so that no two turns' updates are in memory together."""
    rest = {name: module for name, module in candidates.items() if name not in kept.scores}
    moved = bool(kept.scores)  # a stopped run has kept none before one was
    found: dict[str, float] = {}

    for updates in updates_in_turns(model, rest, losses, steps, kept, on_loss, process):
        found |= scores_of(process.together(partial(dict.fromkeys, updates)), updates)
        moved = moved or process.any(any(update.energy() > 0 for update in updates.values()))
        if moved:
            kept.keep_scores(found)
            found = {}
    if not moved:
        raise CalibrationError(
            f"the optimizer would move none of {len(rest)} candidate modules, as when all rewards of each prompt tie, or with a "
            "learning rate of 0: use prompts that are solved sometimes, more samples per prompt, or a positive model.lr_full."
        )


def _small_on_cpu(accumulator: ModuleAccumulator) -> bool:
    """Whether the gradient is small enough for one thread, so that a float64 copy on each thread takes little memory too."""
    return min(accumulator.shape) <= ONE_THREAD_UP_TO and all(tensor.device.type == "cpu" for tensor in accumulator.tensors())


def _statistics(
    name: str,
    weight: Tensor,
    parameters: int,
    accumulator: ModuleAccumulator | None,
    scorer: Scorer,
    loss: Callable[[], float] | None,
    update: Gradient | None,
) -> ModuleStatistics:
    return ModuleStatistics(
        name=name,
        weight=weight,
        parameters=parameters,
        gradient=accumulator.mean() if accumulator else None,
        noise=accumulator.noise() if accumulator and scorer.needs_halves else None,
        update=update,
        evaluate_loss=loss,
    )


def _warn_unused(collected: Mapping[str, ModuleAccumulator], candidates: int, process: ScoringProcess) -> None:
    unused = list(process.together(lambda: {name: None for name, found in collected.items() if not found.received}))
    if unused and process.is_first:
        warnings.warn(
            f"{len(unused)} of {candidates} candidate modules got no gradient from the calibration losses and "
            f"score 0 (such as {unused[0]}): calibrate with more rollouts if they matter.",
            stacklevel=3,
        )

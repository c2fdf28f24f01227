"""The methods that the study compares: what each changes in the config of a task, and how its learning rates are tuned.

A method has one learning rate, that of LoRA or of full fine-tuning. A hybrid has two, whose ratio is the same for all but those
that take one rate for both, or the ratio that the task has.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.study.policies import width_of
from benchmarks.study.spread import SPREADS, Spread
from hybrid_lightning.configurable import constructor_defaults
from hybrid_lightning.policy.module import PolicyModule

ROOT_OF_WIDTH = 4.0  # divided by the root of the hidden size: a rule that the product had
FULL_TO_LORA = 0.3  # of most hybrids: the learning rate of their fully trained modules as a share of LoRA's
SEED = {"adapter.scorer.seed": "{seed}"}  # of a random choice: each run makes its own
SEVERAL_LOSSES = {"model.max_tokens_per_micro_batch": 256}  # of calibration, whose halves SpectrumSNR compares


@dataclass(frozen=True)
class Method:
    """One column of the comparison."""

    name: str
    group: str  # `start`, `full`, `lora`, `baseline`, `hybrid`, `control`, `budget`, `spectrum` or `oracle`
    changes: dict[str, Any] = field(default_factory=dict)  # of the task's config, as options of the command line
    rank: int | None = None  # of LoRA; None takes the task's
    match_state: bool = False  # the rank is the smallest with as many trainable parameters as the hybrid has
    module: str | None = None  # of a policy with another adapter: the class for RL and, below, for examples
    supervised_module: str | None = None
    full_to_lora: float | Literal["task", "width"] = FULL_TO_LORA  # "task": as its config has it; "width": by ROOT_OF_WIDTH
    frozen_rest: bool = False  # modules that are not fully trained stay as they are
    only: str | None = None  # the one module that is fully trained, by name
    spread: Spread | None = None  # how the parameters of LoRA of `rank` are spent instead
    update: tuple[str, int] | None = None  # by whose tail the hybrid's modules are chosen: way (see updates.py) and steps

    @property
    def edits_plan(self) -> bool:
        """Whether it needs a plan that the project's own scores would not make."""
        return self.frozen_rest or any(each is not None for each in (self.only, self.spread, self.update))

    @property
    def untrained(self) -> bool:
        """Whether the start policy is tested as it is, so that there is no learning rate."""
        return self.group == "start"

    @property
    def chooses(self) -> bool:
        """Whether it differs from the hybrid in nothing but which modules it trains fully."""
        return "adapter.scorer" in self.changes and self.full_to_lora == FULL_TO_LORA

    @property
    def fully(self) -> bool:
        """Whether everything is trained fully, so that the one learning rate is that of full fine-tuning."""
        return self.group == "full"

    def options(self, task: dict[str, Any], rank: int | None, learning_rate: float, seed: int) -> dict[str, Any]:
        """Options of the command line for one run; a rank of None is the method's or the task's."""
        if self.untrained:
            return {}
        rank = rank or self.rank or task["adapter"]["rank"]
        rates: dict[str, Any] = {"model.lr_full": learning_rate if self.fully else self._full_rate(task, learning_rate)}
        if not self.fully:
            rates["model.lr_lora"] = learning_rate
        changes = {name: value.format(seed=seed) if isinstance(value, str) else value for name, value in self.changes.items()}
        return {**rates, "adapter.rank": rank, "adapter.alpha": 2 * rank, **changes}

    def _full_rate(self, task: dict[str, Any], learning_rate: float) -> float:
        if self.full_to_lora == "width":
            model = task["model"]
            ratio = min(1.0, ROOT_OF_WIDTH / math.sqrt(width_of(model.get("init_args", model).get("model", "embedded"))))
        else:
            ratio = own_rate(task, "lr_full") / own_rate(task, "lr_lora") if self.full_to_lora == "task" else self.full_to_lora
        return ratio * learning_rate


def own_rate(task: dict[str, Any], name: str) -> float:
    """`lr_full` or `lr_lora` of a task's config; where it has none, what the policy takes then.

    Raises:
        SystemExit: If that depends on the model.
    """
    model = task["model"]
    rate = model.get("init_args", model).get(name, constructor_defaults(PolicyModule)[name])
    if rate is None:
        raise SystemExit(f"error: the config of a task has to name model.{name}, from which tuning starts")
    return float(rate)


def _share(share: float) -> dict[str, Any]:
    return {"adapter.budget.share": share}


def _scorer(name: str, **changes: Any) -> dict[str, Any]:
    return {"adapter.scorer": name, **changes}


def _hybrid(name: str, scorer: str, group: str = "hybrid", **changes: Any) -> Method:
    return Method(name, group, _scorer(scorer, **changes))


def _of_ratio(name: str, full_to_lora: float | Literal["task", "width"]) -> tuple[Method, Method]:
    """A hybrid and a random choice with another ratio of their rates."""
    return (
        Method(f"hybrid_{name}", "hybrid", full_to_lora=full_to_lora),
        Method(f"random_{name}", "control", _scorer("Random", **SEED), full_to_lora=full_to_lora),
    )


def _beside(percent: int, rank: int, name: str = "hybrid", scorer: str | None = None, **changes: Any) -> tuple[Method]:
    """A hybrid with this share of the modules and LoRA of this rank on the rest."""
    changes = {**_share(percent / 100), **(_scorer(scorer, **changes) if scorer else {})}
    return (Method(f"{name}_{percent}_r{rank}", "budget", changes, rank=rank),)


_SPREAD = {"adapter.budget": "benchmarks.study.controls.SpreadBudget", **_share(0.1)}
_RANDOM_MLP = _scorer("benchmarks.study.controls.RandomMLP", **SEED)
_ALL = (
    Method("start", "start"),
    Method("fft", "full", _share(1.0)),
    Method("lora", "lora", _share(0.0)),
    Method("hybrid", "hybrid"),
    _hybrid("random", "Random", "control", **SEED),
    Method("random_mlp", "control", _RANDOM_MLP),
    *_of_ratio("one_rate", 1.0),
    *_of_ratio("own_ratio", "task"),
    Method("dora", "baseline", {**_share(0.0), "adapter.use_dora": True}),
    Method("rslora", "baseline", {**_share(0.0), "adapter.use_rslora": True}),
    Method(
        "adalora",
        "baseline",
        _share(0.0),
        module="benchmarks.study.adalora.AdaLoRAPolicy",
        supervised_module="benchmarks.study.adalora.AdaLoRASupervised",
    ),
    Method("lora_matched", "lora", _share(0.0), match_state=True),
    _hybrid("bottom", "benchmarks.study.controls.Bottom", "control"),
    *(Method(f"lora_r{rank}", "lora", _share(0.0), rank=rank) for rank in (1, 4, 8, 16, 25, 64)),
    Method("only_full", "control", frozen_rest=True),
    _hybrid("tail_fraction", "TailFraction"),
    _hybrid("tail_energy", "TailEnergy"),
    _hybrid("gradient_norm", "GradientNorm"),
    _hybrid("weight_gradient", "WeightGradient"),
    _hybrid("spectrum_snr", "SpectrumSNR", **SEVERAL_LOSSES),
    _hybrid("probe", "Probe"),
    _hybrid("early_outputs", "benchmarks.study.controls.EarlyOutputs"),
    _hybrid("early", "benchmarks.study.controls.Early"),
    _hybrid("late", "benchmarks.study.controls.Late"),
    _hybrid("largest", "benchmarks.study.controls.Largest"),
    *(Method(f"budget_{percent}", "budget", _share(percent / 100)) for percent in (2, 5, 20, 40)),
    *_beside(10, 1),
    *_beside(10, 4),
    *_beside(10, 8),
    *_beside(20, 8),
    *_beside(40, 8),
    Method("hybrid_10_r8_one_rate", "budget", _share(0.1), rank=8, full_to_lora=1.0),
    Method("hybrid_10_r8_half_rate", "budget", _share(0.1), rank=8, full_to_lora=0.5),
    Method("hybrid_three_quarters_rate", "hybrid", full_to_lora=0.75),
    Method("hybrid_10_r8_three_quarters_rate", "budget", _share(0.1), rank=8, full_to_lora=0.75),
    Method("hybrid_by_width", "hybrid", full_to_lora="width"),
    Method("hybrid_10_r8_by_width", "budget", _share(0.1), rank=8, full_to_lora="width"),
    # Beside the full modules, too, what LoRA has is spent on MLPs. As large as rank 8 on all only where MLPs are chosen: the
    # score looks beyond the rank that a module would have, and prefers attention at rank 1.
    Method(
        "hybrid_10_mlp14_by_width",
        "budget",
        {**_share(0.1), "adapter.rank_pattern": {"mlp": 14, "attention": 1}},
        rank=8,
        full_to_lora="width",
    ),
    # The hybrid's modules dealt out over the blocks, and random ones beside it, dealt out or not, at the same rates.
    Method("spread_10_r8_by_width", "budget", _SPREAD, rank=8, full_to_lora="width"),
    Method("random_spread_10_r8_by_width", "control", {**_RANDOM_MLP, **_SPREAD}, rank=8, full_to_lora="width"),
    Method("random_mlp_10_r8_by_width", "control", {**_RANDOM_MLP, **_share(0.1)}, rank=8, full_to_lora="width"),
    Method("random_mlp_one_rate", "control", _RANDOM_MLP, full_to_lora=1.0),
    Method("random_mlp_10_r8_one_rate", "control", {**_RANDOM_MLP, **_share(0.1)}, rank=8, full_to_lora=1.0),
    Method("update_tail_10_r2_one_rate", "budget", {**_share(0.1), **_scorer("UpdateTail")}, rank=2, full_to_lora=1.0),
    Method("update_tail_10_r8_one_rate", "budget", {**_share(0.1), **_scorer("UpdateTail")}, rank=8, full_to_lora=1.0),
    *_beside(10, 2, "update_tail", "UpdateTail"),
    *_beside(10, 8, "update_tail", "UpdateTail"),
    *_beside(10, 8, "random_mlp", "benchmarks.study.controls.RandomMLP", **SEED),
    *(
        Method(f"{spread}_r{rank}", "lora" if spread.startswith("mlp") else "spectrum", _share(0.0), rank=rank, spread=spread)
        for spread in SPREADS
        for rank in (2, 4, 8, 16)
    ),
    *(Method(f"mlp_r{rank}", "lora", _share(0.0), rank=rank, spread="mlp") for rank in (25, 64)),
    *(
        Method(f"tail_{way}_{steps}", "hybrid", update=(way, steps))
        for way, steps in (("fft", 32), ("adam", 32), ("moments", 8), ("moments", 32), ("moments_rank1", 8))
    ),
)
METHODS = {method.name: method for method in _ALL}
CORE = ("fft", "lora", "hybrid", "random", "random_mlp", "dora", "rslora", "adalora", "lora_matched", "bottom")

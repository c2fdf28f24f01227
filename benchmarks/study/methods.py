"""The methods of the study: their changes to a task's config, and how their learning rates are tuned.

A method has one learning rate, for LoRA or for full fine-tuning. A hybrid has two, with the same ratio for all hybrids, except
those with one rate for both or with the task's ratio. Records also name abandoned methods (ranks by spectra, modules spread over
blocks, only fully trained modules, scorers): the commit in a record has their code.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.study.policies import shape_of
from hybrid_lightning.shared.configurable import constructor_defaults
from hybrid_lightning.training.policy_module import PolicyModule

ROOT_OF_WIDTH = 4.0  # divided by the root of the hidden size: an earlier rule; for SmolLM2 it equals the current one
FULL_TO_LORA = 0.3  # for most hybrids: learning rate of the fully trained modules, divided by LoRA's
SEED = {"adapter.scorer.seed": "{seed}"}  # of a random choice: each run makes its own
CONTROLS, ADALORA = "benchmarks.study.controls", "benchmarks.study.adalora.AdaLoRA"


@dataclass(frozen=True)
class Method:
    """One column of the comparison."""

    name: str
    group: str  # `start` (tested as it is), `full`, `lora`, `baseline`, `hybrid`, `control` or `budget`
    changes: dict[str, Any] = field(default_factory=dict)  # of the task's config, as options of the command line
    rank: int | None = None  # of LoRA; None takes the task's
    match_state: bool = False  # the smallest rank with at least the hybrid's number of trainable parameters
    module: str | None = None  # for a policy with another adapter: its class for RL and, below, for examples
    supervised_module: str | None = None
    full_to_lora: float | Literal["task", "width"] = FULL_TO_LORA  # "task": as its config has it; "width": by ROOT_OF_WIDTH
    attention: int | None = None  # rank of attention, where MLPs get what is left of the parameters of LoRA of `rank`
    given_up: bool = False  # its scorer is no longer in the package: tables show its records, and commit 7fce0125 still runs it

    @property
    def chooses(self) -> bool:
        """Whether it differs from the hybrid only in which modules it trains fully."""
        return "adapter.scorer" in self.changes and self.full_to_lora == FULL_TO_LORA

    def options(self, task: dict[str, Any], rank: int | None, learning_rate: float, seed: int) -> dict[str, Any]:
        """Command-line options for one run; a rank of None stands for the method's or the task's rank."""
        if self.group == "start":
            return {}
        rank = rank or self.rank or task["adapter"]["rank"]
        rates: dict[str, Any] = {"model.lr_full": learning_rate if self.group == "full" else self._full_rate(task, learning_rate)}
        if self.group != "full":
            rates["model.lr_lora"] = learning_rate
        changes = {name: value.format(seed=seed) if isinstance(value, str) else value for name, value in self.changes.items()}
        if self.attention is not None:
            ranks = {"attention": self.attention, "mlp": shape_of(_model(task)).rank_of_mlps(rank, self.attention)}
            changes["adapter.rank_pattern"] = ranks
        return {**rates, "adapter.rank": rank, "adapter.alpha": 2 * rank, **changes}

    def _full_rate(self, task: dict[str, Any], learning_rate: float) -> float:
        if self.full_to_lora == "width":
            ratio = min(1.0, ROOT_OF_WIDTH / math.sqrt(shape_of(_model(task)).width))
        else:
            ratio = own_rate(task, "lr_full") / own_rate(task, "lr_lora") if self.full_to_lora == "task" else self.full_to_lora
        return ratio * learning_rate


def _model(task: dict[str, Any]) -> str:
    return str(task["model"].get("init_args", task["model"]).get("model", "embedded"))


def own_rate(task: dict[str, Any], name: str) -> float:
    """`lr_full` or `lr_lora` of a task's config, or else the policy's default."""
    model = task["model"]
    rate = model.get("init_args", model).get(name, constructor_defaults(PolicyModule)[name])
    if rate is None:
        raise SystemExit(f"error: the config of a task has no model.{name}, from which tuning starts; name one")
    return float(rate)


def _share(share: float) -> dict[str, Any]:
    return {"adapter.budget.share": share}


def _scorer(name: str, **changes: Any) -> dict[str, Any]:
    return {"adapter.scorer": name, **changes}


_NONE, _TENTH = _share(0.0), _share(0.1)
_RANDOM, _RANDOM_MLP = _scorer("Random", **SEED), _scorer(f"{CONTROLS}.RandomMLP", **SEED)
_RATIOS: dict[str, Any] = {"one_rate": 1.0, "three_quarters_rate": 0.75, "half_rate": 0.5, "by_width": "width"}
ALL = (
    Method("start", "start"),
    Method("fft", "full", _share(1.0)),
    Method("lora", "lora", _NONE),
    Method("hybrid", "hybrid"),
    Method("random", "control", _RANDOM),
    Method("random_mlp", "control", _RANDOM_MLP),
    Method("random_one_rate", "control", _RANDOM, full_to_lora=1.0),
    Method("hybrid_own_ratio", "hybrid", full_to_lora="task"),
    Method("random_own_ratio", "control", _RANDOM, full_to_lora="task"),
    Method("dora", "baseline", {**_NONE, "adapter.use_dora": True}),
    Method("rslora", "baseline", {**_NONE, "adapter.use_rslora": True}),
    Method("adalora", "baseline", _NONE, module=f"{ADALORA}Policy", supervised_module=f"{ADALORA}Supervised"),
    Method("lora_matched", "lora", _NONE, match_state=True),
    Method("bottom", "control", _scorer(f"{CONTROLS}.Bottom")),
    *(Method(f"lora_r{rank}", "lora", _NONE, rank=rank) for rank in (1, 4, 8, 16, 25, 64)),
    Method("tail_fraction", "hybrid", _scorer("TailFraction")),
    Method("tail_energy", "hybrid", _scorer("TailEnergy")),
    Method("gradient_norm", "hybrid", _scorer("GradientNorm")),
    *(Method(name, "hybrid", _scorer(name), given_up=True) for name in ("weight_gradient", "spectrum_snr", "probe")),
    Method("early_outputs", "hybrid", _scorer(f"{CONTROLS}.EarlyOutputs")),
    *(Method(name.lower(), "hybrid", _scorer(f"{CONTROLS}.{name}")) for name in ("Early", "Late", "Largest")),
    *(Method(f"budget_{percent}", "budget", _share(percent / 100)) for percent in (2, 5, 20, 40)),
    # Beside LoRA of another rank, or at another ratio of the two rates.
    *(
        Method(f"hybrid_{percent}_r{rank}", "budget", _share(percent / 100), rank=rank)
        for percent, rank in ((10, 4), (10, 8), (20, 8), (40, 8))
    ),
    *(Method(f"hybrid_{ratio}", "hybrid", full_to_lora=_RATIOS[ratio]) for ratio in _RATIOS),
    *(Method(f"hybrid_10_r8_{ratio}", "budget", _TENTH, rank=8, full_to_lora=_RATIOS[ratio]) for ratio in _RATIOS),
    Method("random_mlp_one_rate", "control", _RANDOM_MLP, full_to_lora=1.0),
    Method("random_mlp_10_r8", "control", {**_TENTH, **_RANDOM_MLP}, rank=8),
    Method("random_mlp_10_r8_one_rate", "control", {**_TENTH, **_RANDOM_MLP}, rank=8, full_to_lora=1.0),
    # LoRA that is spent on MLPs, with attention at rank 1 or without any.
    *(Method(f"mlp_r{rank}", "lora", _NONE, rank=rank, attention=1) for rank in (4, 8, 16, 25, 64)),
    *(Method(f"mlp_only_r{rank}", "lora", _NONE, rank=rank, attention=0) for rank in (4, 8)),
)
METHODS = {method.name: method for method in ALL if not method.given_up}
CORE = ("fft", "lora", "hybrid", "random", "random_mlp", "dora", "rslora", "adalora", "lora_matched", "bottom")

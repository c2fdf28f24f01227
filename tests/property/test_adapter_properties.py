"""What must hold for any adapter, plan or gradient."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import build_model

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, ParameterBudget, find_candidates, make_plan
from hybrid_lightning.adapters.apply import adapter_disabled, apply_plan, parameter_groups
from hybrid_lightning.adapters.gradients import ExactGradient
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, PlannedModule
from hybrid_lightning.adapters.sketch import SketchedSum
from hybrid_lightning.errors import ConfigError

LORA = st.builds(
    LoraSettings,
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 16),
    dropout=st.floats(0, 0.5),
    use_dora=st.booleans(),
    use_rslora=st.booleans(),
)
SCORE = st.floats(-1e6, 1e12, allow_nan=False) | st.integers(0, 3).map(float)
LORA_MODE, NO_RANK = st.just("lora"), st.none()


def linear_modules(score=SCORE, mode=LORA_MODE, rank=NO_RANK):
    sizes = st.integers(1, 64)
    build = st.tuples(st.tuples(sizes, sizes), score, mode, rank)
    return st.lists(build, min_size=1, max_size=20).map(
        lambda items: tuple(
            PlannedModule(f"layers.{i}.fc", shape, shape[0] * shape[1], score, mode, rank)
            for i, (shape, score, mode, rank) in enumerate(items)
        )
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLANS = st.builds(
    AdapterPlan,
    model=st.text(max_size=20),
    revision=st.none() | st.text(max_size=5),
    model_digest=st.text("0123456789abcdef", min_size=8, max_size=8),
    candidates=linear_modules(st.none() | SCORE, st.sampled_from(["full", "lora", "frozen"]), st.none() | st.integers(1, 9)),
    lora=LORA,
    budget=st.dictionaries(st.text(max_size=5), JSON, max_size=2),
    scorer=st.none() | st.dictionaries(st.text(max_size=5), JSON, max_size=2),
    calibration=st.dictionaries(st.text(max_size=5), JSON, max_size=2),
    seed=st.none() | st.integers(0, 2**63),
)


@given(PLANS)
@settings(max_examples=60, deadline=None)
def test_plans_survive_json(plan):
    again = AdapterPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.digest == plan.digest


@given(linear_modules(), LORA, st.floats(0, 1), st.floats(0, 1), st.randoms())
@settings(max_examples=150, deadline=None)
def test_a_larger_budget_only_adds_modules_whatever_their_order(modules, lora, one, other, random):
    low, high = sorted((one, other))
    shuffled = random.sample(modules, len(modules))
    assert ModuleBudget(low).choose(modules, lora) <= ModuleBudget(high).choose(shuffled, lora)
    assert ModuleBudget(low).choose(modules, lora) == ModuleBudget(low).choose(shuffled, lora)
    total = sum(module.parameters for module in modules)
    chosen = []
    for share in (low, high):
        try:
            chosen.append(ParameterBudget(share).choose(modules, lora))
        except ConfigError:  # not even the first module fits
            chosen.append(frozenset())
        used = sum(module.parameters for module in modules if module.name in chosen[-1])
        assert used <= share * total * (1 + 1e-6)
    assert chosen[0] <= chosen[1]


MATRICES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))


@given(MATRICES, st.integers(1, 13))
@example((6, 6, 6), 5)
@settings(max_examples=80, deadline=None)
def test_tail_energy_properties(matrix, rank):
    rows, columns, seed = matrix
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    exact = ExactGradient(gradient)
    tail = exact.tail_energy(rank)
    assert 0 <= tail <= exact.energy() * (1 + 1e-9)
    assert exact.tail_energy(rank + 1) <= tail
    assert tail == pytest.approx(ExactGradient(gradient.T).tail_energy(rank), rel=1e-6, abs=1e-9)
    # In float64, where three times a float32 number is exact: rounding would move the smallest singular values.
    assert ExactGradient(3 * gradient.double()).tail_energy(rank) == pytest.approx(9 * tail, rel=1e-6, abs=1e-9)
    if rank >= min(rows, columns):
        assert tail == 0


@given(MATRICES, st.integers(13, 15), st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_sketches_larger_than_the_matrix_lose_nothing(matrix, size, rank, seed):
    rows, columns, matrix_seed = matrix
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(matrix_seed))
    total = SketchedSum("a", (rows, columns), torch.device("cpu"), size, seed)
    total.add(gradient)
    sketched, exact = total.mean(1), ExactGradient(gradient)
    assert sketched.energy() == pytest.approx(exact.energy(), rel=1e-3)
    assert sketched.tail_energy(rank) == pytest.approx(exact.tail_energy(rank), rel=1e-3, abs=1e-3 * exact.energy())


@given(
    LORA,
    st.lists(st.sampled_from(["full", "lora", "frozen"]), min_size=14, max_size=14),
    st.lists(st.none() | st.integers(1, 6), min_size=14, max_size=14),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_merging_preserves_logits_and_disabling_restores_them(lora, modes, ranks, seed):
    if set(modes) == {"frozen"}:
        return
    model = build_model("llama", std=0.02)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        base = model(tokens).logits
        plan = make_plan(PlannedModel("tiny", "0"), find_candidates(model), ModuleBudget(0), lora)
        kinds = zip(plan.candidates, modes, ranks, strict=True)
        candidates = tuple(dataclasses.replace(m, mode=mode, rank=rank) for m, mode, rank in kinds)
        adapted = apply_plan(model, dataclasses.replace(plan, candidates=candidates)).eval()
        assert torch.equal(adapted(tokens).logits, base)
        torch.manual_seed(seed)
        for parameters in parameter_groups(adapted):
            for parameter in parameters.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        changed = adapted(tokens).logits
        with adapter_disabled(adapted):
            assert torch.equal(adapted(tokens).logits, base)
        merged = copy.deepcopy(adapted).merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, changed, rtol=0, atol=1e-6)

"""How the study spends one budget of LoRA parameters on modules, and the spectra by which it does."""

import random
from pathlib import Path

import pytest
import yaml

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from test_study_runs import task  # noqa: F401  (the fixture)

from benchmarks.study.records import Job, load
from benchmarks.study.runner import make_run
from benchmarks.study.spread import ranks_of, water_filled
from benchmarks.study.store import Store
from benchmarks.study.updates import STEPS, Updates, make

SHAPES = {"0.attn.q": (8, 8), "0.mlp.up": (24, 8), "1.attn.q": (8, 8), "1.mlp.up": (24, 8)}


def test_the_next_rank_goes_where_it_is_worth_most_a_parameter():
    """`a` costs 4 a rank and `b` 8: in order a 8/4, b 12/8, a 4/4, b 6/8, and then only a third rank of `a` would fit."""
    spectra = {"a": [8.0, 4.0, 1.0], "b": [12.0, 6.0, 1.0]}
    shapes = {"a": (2, 2), "b": (4, 4)}
    assert [water_filled(spectra, shapes, budget) for budget in (3, 4, 12, 16)] == [
        {"a": 0, "b": 0},
        {"a": 2, "b": 0},  # at rank 1 its weight has as many parameters: it is full
        {"a": 2, "b": 1},
        {"a": 2, "b": 1},
    ]


@pytest.mark.parametrize("seed", range(20))
def test_all_of_the_budget_is_spent_and_no_more(seed):
    draws = random.Random(seed)
    shapes = {str(place): (draws.randint(8, 40), draws.randint(8, 40)) for place in range(9)}
    spectra = {name: sorted((draws.random() for _ in range(min(shape))), reverse=True) for name, shape in shapes.items()}
    budget = draws.randint(0, 2000)
    ranks = water_filled(spectra, shapes, budget)
    spent = sum(min(ranks[name] * sum(shape), shape[0] * shape[1]) for name, shape in shapes.items())
    assert spent <= budget
    costs = [min(sum(shape), shape[0] * shape[1] - ranks[n] * sum(shape)) for n, shape in shapes.items() if ranks[n] < min(shape)]
    assert all(budget - spent < cost for cost in costs)


def test_mlps_get_what_attention_leaves():
    budget = 4 * (16 + 32 + 16 + 32)
    assert ranks_of("mlp", SHAPES, 4, {}) == {name: 1 if "attn" in name else (budget - 32) // 64 for name in SHAPES}
    assert ranks_of("mlp_only", SHAPES, 4, {}) == {name: 0 if "attn" in name else budget // 64 for name in SHAPES}
    flat = {name: [1.0] * 8 for name in SHAPES}
    within = ranks_of("spectrum_mlp", SHAPES, 2, flat)
    assert within["0.attn.q"] == within["1.attn.q"] == 1 and within["0.mlp.up"] + within["1.mlp.up"] == (192 - 32) // 32


def test_ranks_follow_what_a_short_training_has_changed(task, tmp_path):  # noqa: F811
    folder = tmp_path / "results"
    config = yaml.safe_load(Path(task).read_text())
    config["trainer"]["max_steps"] = STEPS[-1] + 2
    Path(task).write_text(yaml.safe_dump(config))
    for way in ("fft", "moments"):
        make(Updates(task, way, 1e-3, 2000), folder)
        found = Store(folder).within(f"updates/small/{way}")["seed=2000.json"]["tails"]
        assert list(found) == [str(step) for step in STEPS]
        assert all(values == sorted(values, reverse=True) and values[0] > 0 for values in found["32"].values())
    record = load(make_run(Job(task, "spectrum_r4", 1e-2, 0, "run"), folder))
    budget = 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))  # of rank 4 on the embedded policy's 4 blocks
    assert len(set(record.ranks.values())) > 1 and budget - 512 < record.trainable_parameters <= budget
    chosen = load(make_run(Job(task, "tail_moments_8", 1e-2, 0, "run"), folder))
    assert set(chosen.full_modules) == set(sorted(found["8"], key=lambda name: -found["8"][name][4])[:3])

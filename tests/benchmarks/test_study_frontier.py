from dataclasses import asdict, replace

import pytest
from study_records import keep, record

from benchmarks.study import frontier, pretrain
from benchmarks.study.policies import RECIPES
from benchmarks.study.store import Store, write


def test_a_run_needs_its_start_policy_and_beside_others_that_which_they_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "wide", replace(RECIPES["wide"], steps=1, batch_size=4))
    for rate in (0.005, 0.01, 0.02):
        keep(tmp_path, *(record("lora", rate, seed, "sweep", accuracy=rate / (1 if rate < 0.02 else 4)) for seed in (1000, 1001)))
    (tmp_path / "sweep" / "sums").rename(tmp_path / "sweep" / "facts")
    with pytest.raises(SystemExit, match=r"wide-7 is not there: run python -m benchmarks.study.pretrain --policy wide --seeds 7"):
        frontier.jobs_of(Store(tmp_path), "tasks/facts.yaml", ["lora"], [7])
    pretrain.make("wide", 7, own_folder=True)
    assert [job.seed for job in frontier.jobs_of(Store(tmp_path), "tasks/facts.yaml", ["lora"], [7])] == [7]
    _, made = record("fft", seed=7, purpose="frontier")
    write(asdict(replace(made, model_digest="abc")), tmp_path / "frontier" / "facts" / "fft" / "lr=0.01-seed=7.json")
    with pytest.raises(SystemExit, match=r"seed 7 of facts .* abc, "):
        frontier.jobs_of(Store(tmp_path), "tasks/facts.yaml", ["lora"], [7])


def test_a_given_rate_makes_trials_that_begin_at_the_model_of_a_task_outside_the_study(tmp_path):
    (job,) = frontier.jobs_of(Store(tmp_path), "tasks/sums.yaml", ["hybrid_10_r8"], [5], 0.002)
    assert job.file == "trial/sums/hybrid_10_r8/lr=0.002-seed=5.json" and job.policy is None and job.rank == 8

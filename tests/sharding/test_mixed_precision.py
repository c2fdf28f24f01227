"""Under bfloat16 autocast a sharded run is the DDP run of as many ranks, and begins every rollout on-policy."""

import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import train_each
from test_equal_to_one_process import STRATEGIES

JOBS = {
    dtype: {"policy": {"dtype": dtype, "epochs_per_rollout": 2}, "precision": "bf16-mixed", "max_steps": 5}
    for dtype in ("bfloat16", "float32")
}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    found = {}
    for name, strategy in STRATEGIES.items():
        jobs = {dtype: job for dtype, job in JOBS.items() if name != "fsdp1" or dtype == "float32"}
        arguments = {"folder": folder, "root": root / name, "strategy": strategy, "devices": 2}
        found[name] = run(2, root / "ranks" / name, train_each, jobs=jobs, **arguments)[0]
    return found


@pytest.mark.parametrize("dtype", JOBS)
def test_fsdp2_computes_what_ddp_computes(results, dtype):
    one, other = results["fsdp2"][dtype], results["ddp"][dtype]
    torch.testing.assert_close(one["weights"], other["weights"], atol=1e-5, rtol=0)
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_step_of_every_rollout_has_a_ratio_of_one(results, strategy):
    for result in results[strategy].values():
        ratios = [step["ratio/max"] for step in result["steps"]]
        assert ratios[0] == ratios[4] == 1.0 and max(ratios[1:4]) > 1.0


def test_fsdp1_is_as_near_as_rounding_allows(results):
    one, other = results["fsdp1"]["float32"], results["ddp"]["float32"]
    assert one["steps"][0] == pytest.approx(other["steps"][0], rel=2e-2, abs=2e-2)
    for name, weight in other["weights"].items():
        assert (one["weights"][name] - weight).norm() <= 0.02 * weight.norm() + 1e-3, name

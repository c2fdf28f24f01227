"""A checkpoint written under one strategy and number of ranks goes on under any other, in the middle of a rollout."""

import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import train_each
from test_equal_to_one_process import ADAM, STRATEGIES

from hybrid_lightning.policy.module import PolicyModule

# Two passes over two minibatches: after one optimizer step three of a rollout are left, and after the fourth comes a second one.
ARGUMENTS = {"policy": {**ADAM, "epochs_per_rollout": 2}, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
WRITERS = {"one process": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": (STRATEGIES["fsdp2"], 3), "fsdp1": (STRATEGIES["fsdp1"], 2)}
READERS = {"one process": ("auto", 1), "ddp": ("ddp", 3), "fsdp2": (STRATEGIES["fsdp2"], 2), "fsdp1": (STRATEGIES["fsdp1"], 3)}
# Which checkpoints each goes on from: every writer's under another strategy and number of ranks.
CROSSINGS = {
    "one process": tuple(WRITERS),
    "ddp": ("one process", "fsdp1"),
    "fsdp2": ("one process", "ddp"),
    "fsdp1": ("fsdp2",),
}


@pytest.fixture(scope="module")
def unstopped(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("unstopped")
    jobs = {"whole": {**ARGUMENTS, "max_steps": 6}}
    return run(1, root / "process", train_each, jobs=jobs, folder=folder, root=root)[0]["whole"]


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """A checkpoint of each writer after the first step."""
    root = tmp_path_factory.mktemp("saved")
    for name, (strategy, ranks) in WRITERS.items():
        job = {name: {**ARGUMENTS, "max_steps": 1, "save": root / f"{name}.ckpt"}}
        arguments = {"folder": folder, "root": root / "run", "strategy": strategy, "devices": ranks}
        run(ranks, root / "ranks" / name, train_each, jobs=job, **arguments)
    return root


@pytest.mark.parametrize("reader", READERS)
def test_it_goes_on_as_if_it_had_not_been_stopped(folder, tmp_path, saved, unstopped, reader):
    strategy, ranks = READERS[reader]
    jobs = {name: {**ARGUMENTS, "max_steps": 6, "ckpt_path": saved / f"{name}.ckpt"} for name in CROSSINGS[reader]}
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": strategy, "devices": ranks}
    for result in run(ranks, tmp_path / "ranks", train_each, jobs=jobs, **arguments):
        for writer in CROSSINGS[reader]:
            resumed = result[writer]
            assert resumed["global_step"] == 6 and len(resumed["steps"]) == 5, writer
            assert resumed["plan"] == unstopped["plan"]
            for one, other in zip(resumed["steps"], unstopped["steps"][1:], strict=True):
                assert one == pytest.approx(other, abs=1e-5, rel=1e-5), writer
            torch.testing.assert_close(resumed["weights"], unstopped["weights"], atol=1e-5, rtol=0)
            assert resumed["validation"] == pytest.approx(unstopped["validation"], abs=1e-6), writer


def test_it_is_the_same_file_whoever_wrote_it(saved):
    contents = {name: torch.load(saved / f"{name}.ckpt", weights_only=True) for name in WRITERS}
    whole = contents["one process"]
    names = set(whole["state_dict"])
    (state,) = whole["optimizer_states"]
    assert set(state["state"]) == names == {name for group in state["param_groups"] for name in group["params"]}
    for name, content in contents.items():
        torch.testing.assert_close(content["state_dict"], whole["state_dict"], atol=1e-5, rtol=0)
        (other,) = content["optimizer_states"]
        torch.testing.assert_close(other["state"], state["state"], atol=1e-5, rtol=0)
        assert other["param_groups"] == state["param_groups"], name
        assert content["hybrid_lightning"] == whole["hybrid_lightning"], name


def test_a_sharded_runs_checkpoint_loads_alone(saved):
    loaded = PolicyModule.load_from_checkpoint(saved / "fsdp2.ckpt")
    weights = torch.load(saved / "fsdp2.ckpt", weights_only=True)["state_dict"]
    parameters = dict(loaded.named_parameters())
    assert weights and all(torch.equal(parameters[name], value) for name, value in weights.items())

"""The float32 weights behind bfloat16 ones are in checkpoints, and every strategy reads them from any other's."""

from functools import partial

import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import train_each
from test_equal_to_one_process import ADAM

from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.sharded_folder import read_folder

ARGUMENTS = {
    "policy": {**ADAM, "dtype": "bfloat16", "epochs_per_rollout": 2},
    "precision": "bf16-true",
    "num_sanity_val_steps": 0,
    "max_steps": 2,
}
RUNS = {
    "one process": ("auto", 1),
    "ddp": ("ddp", 2),
    "fsdp2": (FSDP2Strategy, 3),
    "fsdp1": (FSDP1Strategy, 2),
    "fsdp2 folder": (partial(FSDP2Strategy, save_distributed_checkpoint=True), 2),
    "fsdp1 folder": (partial(FSDP1Strategy, state_dict_type="sharded"), 2),
}
READS = [
    ("one process", "fsdp2"),
    ("ddp", "fsdp1"),
    ("fsdp2", "fsdp1 folder"),
    ("fsdp1", "fsdp2 folder"),
    ("fsdp2 folder", "one process"),
    ("fsdp1 folder", "fsdp2"),
]


def content(path):
    """Weights, moments and the dtype that is said, with names for everything."""
    found = read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    (state,) = found["optimizer_states"]
    return found["state_dict"], state["state"], found["hybrid_lightning"]["trained_dtype"]


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """Checkpoints of each run, and of each reader that has made no step since."""
    root = tmp_path_factory.mktemp("saved")
    write = {name: {**ARGUMENTS, "strategy": strategy, "save": root / f"{name}.ckpt"} for name, (strategy, _) in RUNS.items()}
    read = {
        (reader, writer): {
            **ARGUMENTS,
            "strategy": RUNS[reader][0],
            "ckpt_path": root / f"{writer}.ckpt",
            "save": root / f"{reader} of {writer}.ckpt",
        }
        for reader, writer in READS
    }
    # As many ranks as write, and in the end read, do so one after the other: a start costs as much as a run.
    for turn, (ranks, jobs) in enumerate(((1, write), (3, write), (2, {**write, **read}), (3, read), (1, read))):
        mine = {name: job for name, job in jobs.items() if ranks == RUNS[name[0] if name in read else name][1]}
        arguments = {"folder": folder, "root": root / "runs", "devices": ranks}
        run(ranks, root / f"ranks {turn}", train_each, timeout_s=240, jobs=mine, **arguments)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_no_half_is_lost(saved, name):
    weights, state, dtype = content(saved / f"{name}.ckpt")
    assert dtype == "torch.bfloat16" and weights.keys() == state.keys()
    below = 0
    for weight, entry in zip(weights.values(), map(state.get, weights), strict=True):
        assert weight.dtype == torch.bfloat16 and torch.equal(entry["master_weight"].bfloat16(), weight)
        assert {entry[key].dtype for key in ("master_weight", "exp_avg", "exp_avg_sq")} == {torch.float32}
        below += int((entry["master_weight"] != weight).sum())
    assert below > 0.9 * sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize(("reader", "writer"), READS)
def test_it_is_read_as_it_was_written(saved, reader, writer):
    found, found_state, _ = content(saved / f"{reader} of {writer}.ckpt")
    weights, state, _ = content(saved / f"{writer}.ckpt")
    assert found.keys() == weights.keys() and found_state.keys() == state.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name
        assert found_state[name].keys() == state[name].keys(), name
        assert all(torch.equal(found_state[name][key], value) for key, value in state[name].items()), name

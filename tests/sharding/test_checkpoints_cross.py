"""A checkpoint written under one strategy and number of ranks goes on under any other, in the middle of a rollout."""

from functools import partial

import pytest
import torch
from runs_of_tests import ADAM, STRATEGIES, assert_same_run
from safetensors.torch import load_file

from hybrid_lightning.callbacks import PolicyExport
from hybrid_lightning.export import MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy
from hybrid_lightning.sharding.sharded_folder import read_folder

# Two minibatches of a rollout: after one optimizer step one is left, and then comes a second rollout.
ARGUMENTS = {"policy": ADAM, "accumulate_grad_batches": 2}
SHARDED = {
    "fsdp2 sharded": partial(FSDP2Strategy, save_distributed_checkpoint=True),
    "fsdp1 sharded": partial(FSDP1Strategy, state_dict_type="sharded"),
}
WRITERS = {"one process": ("auto", 1), **{name: (strategy, 2) for name, strategy in STRATEGIES.items()}}
WRITERS |= {"fsdp2 sharded": (SHARDED["fsdp2 sharded"], 2), "fsdp1 sharded": (SHARDED["fsdp1 sharded"], 3)}
READERS = {
    "one process": ("auto", 1),
    "ddp": ("ddp", 2),
    "fsdp2": (SHARDED["fsdp2 sharded"], 3),
    "fsdp1": (SHARDED["fsdp1 sharded"], 2),
}
# Which checkpoints each goes on from, of other strategies.
CROSSINGS = {"one process": ("fsdp1 sharded", "fsdp2 sharded"), "ddp": ("fsdp2",), "fsdp2": ("fsdp1",), "fsdp1": ("one process",)}
# What is changed as they go on, all from the same checkpoint; but that DDP reads as one process does.
ADAM_CHANGED = partial(torch.optim.AdamW, betas=(0.7, 0.8), eps=1e-3)
CHANGED = {"policy": {"lr_full": 1e-4, "lr_lora": 2e-2, "optimizer": ADAM_CHANGED}, "gradient_clip_val": 0.5}
CHANGING = ("one process", "fsdp2", "fsdp1")
# Of bfloat16 weights, behind which there are float32 ones: the first trains; each of the others reads, without a step, what the
# one before has written, and writes it again. As many ranks follow each other.
HALF = {"policy": {**ADAM, "dtype": "bfloat16"}, "precision": "bf16-true", "max_steps": 2}
HALF_CHAIN = ("one process", "fsdp2", "fsdp1", "fsdp2 sharded", "fsdp1 sharded")


@pytest.fixture(scope="module")
def runs(train_on, tmp_path_factory):
    """Where the writers' checkpoints after the first step are, and what each reader's ranks found: {name: result}."""
    root = tmp_path_factory.mktemp("saved")
    jobs = {"unstopped": (1, {**ARGUMENTS, "max_steps": 3})}  # name -> ranks, arguments
    for name, (strategy, ranks) in WRITERS.items():
        jobs[name] = ranks, {**ARGUMENTS, "strategy": strategy, "max_steps": 1, "save": root / f"{name}.ckpt"}
    jobs["fsdp2"][1]["callbacks"] = (PolicyExport(MergedModel("float32"), str(root / "live"), every_n_steps=1),)
    for place, name in enumerate(HALF_CHAIN):
        strategy, ranks = WRITERS[name]
        before = {"ckpt_path": root / f"half {place - 1}.ckpt"} if place else {}
        jobs["half", place] = ranks, {**HALF, **before, "strategy": strategy, "save": root / f"half {place}.ckpt"}
    for reader, (strategy, ranks) in READERS.items():
        of_reader = {"strategy": strategy, "max_steps": 3}
        for writer in CROSSINGS[reader]:
            jobs[reader, writer] = ranks, {**ARGUMENTS, **of_reader, "ckpt_path": root / f"{writer}.ckpt"}
        if reader in CHANGING:
            jobs[reader, "changed"] = ranks, {**ARGUMENTS, **CHANGED, **of_reader, "ckpt_path": root / "fsdp2 sharded.ckpt"}
    found = {}
    # As many ranks do all of theirs one after the other: a start costs as much as a run. One process reads last.
    last = {name for name in jobs if name[0] == "one process"}
    for number in (1, 2, 3, "last"):
        mine = {name: job for name, (ranks, job) in jobs.items() if number == ("last" if name in last else ranks)}
        results = train_on(1 if number == "last" else number, mine)
        found |= {name: [result[name] for result in results] for name in mine}
    return root, found


@pytest.mark.parametrize("reader", READERS)
def test_it_goes_on_as_if_it_had_not_been_stopped(runs, reader):
    _, found = runs
    (unstopped,) = found["unstopped"]
    for writer in CROSSINGS[reader]:
        assert len(found[reader, writer]) == READERS[reader][1]
        for resumed in found[reader, writer]:
            assert resumed["global_step"] == 3 and len(resumed["steps"]) == 2, writer
            assert_same_run(resumed, unstopped, writer)


def test_what_is_changed_is_applied_under_every_strategy(runs):
    _, found = runs
    (expected,), (unchanged,) = found["one process", "changed"], found["one process", "fsdp2 sharded"]
    assert expected["steps"][0]["loss"] != unchanged["steps"][0]["loss"], "the rollout in progress is drawn again"
    for reader in CHANGING[1:]:
        for resumed in found[reader, "changed"]:
            assert_same_run(resumed, expected, reader)


def content_of(path):
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def test_it_holds_the_same_whoever_wrote_it(runs):
    contents = {name: content_of(runs[0] / f"{name}.ckpt") for name in WRITERS}
    whole = contents["one process"]
    (state,) = whole["optimizer_states"]
    assert (
        set(state["state"]) == set(whole["state_dict"]) == {name for group in state["param_groups"] for name in group["params"]}
    )
    for name, content in contents.items():
        assert content.keys() == whole.keys(), name
        torch.testing.assert_close(content["state_dict"], whole["state_dict"], atol=1e-5, rtol=0)
        (other,) = content["optimizer_states"]
        torch.testing.assert_close(other["state"], state["state"], atol=1e-5, rtol=0)
        assert other["param_groups"] == state["param_groups"], name
        assert content["hybrid_lightning"] == whole["hybrid_lightning"], name


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_writes_a_part_of_its_own(runs, name):
    """Of weights and moments none is written twice, and no frozen one at all."""
    path = runs[0] / f"{name}.ckpt"
    content = read_folder(path)
    moments = [value for entry in content["optimizer_states"][0]["state"].values() for value in entry.values()]
    size = 4 * sum(tensor.numel() for tensor in (*content["state_dict"].values(), *moments))
    files = {path.name: path.stat().st_size for path in path.iterdir() if path.suffix == ".distcp"}
    assert set(files) == {f"__{rank}_0.distcp" for rank in range(WRITERS[name][1])}
    tensors = 5 * len(content["state_dict"]) * WRITERS[name][1]
    assert size < sum(files.values()) < size + 2000 * tensors, "torch adds a little to every part"


def test_one_process_loads_and_exports_what_several_have_written(runs):
    path, of_one = runs[0] / "fsdp2 sharded.ckpt", runs[0] / "one process.ckpt"
    parameters = dict(PolicyModule.load_from_checkpoint(path).named_parameters())
    weights = read_folder(path)["state_dict"]
    assert weights and all(torch.equal(parameters[name], value) for name, value in weights.items())
    policy, whole = policy_of_checkpoint(path), policy_of_checkpoint(of_one)
    assert policy.plan == whole.plan and policy.training == whole.training and policy.base == whole.base
    torch.testing.assert_close(policy.weights, whole.weights, atol=1e-5, rtol=0)


def test_a_split_model_is_exported_whole_while_it_is_trained(runs, tmp_path):
    """As it is exported from its checkpoint; that this is what was trained is shown in `export`."""
    write_policy(policy_of_checkpoint(runs[0] / "fsdp2.ckpt"), MergedModel("float32"), tmp_path / "saved")
    live, later = (load_file(path / "model.safetensors") for path in (runs[0] / "live" / "step=1", tmp_path / "saved"))
    assert live.keys() == later.keys() and all(torch.equal(live[name], later[name]) for name in live)


def test_no_half_of_a_bfloat16_weight_is_lost(runs):
    """It is read as it was written, by every strategy from another's."""
    first, *others = (content_of(runs[0] / f"half {place}.ckpt") for place in range(len(HALF_CHAIN)))
    weights, state = first["state_dict"], first["optimizer_states"][0]["state"]
    assert first["hybrid_lightning"]["trained_dtype"] == "torch.bfloat16" and weights.keys() == state.keys()
    below = 0
    for weight, entry in zip(weights.values(), map(state.get, weights), strict=True):
        assert weight.dtype == torch.bfloat16 and torch.equal(entry["master_weight"].bfloat16(), weight)
        assert {entry[key].dtype for key in ("master_weight", "exp_avg", "exp_avg_sq")} == {torch.float32}
        below += int((entry["master_weight"] != weight).sum())
    assert below > 0.9 * sum(weight.numel() for weight in weights.values())
    for found in others:
        torch.testing.assert_close(found["state_dict"], weights, atol=0, rtol=0)
        torch.testing.assert_close(found["optimizer_states"][0]["state"], state, atol=0, rtol=0)

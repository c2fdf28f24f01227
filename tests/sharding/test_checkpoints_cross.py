"""A checkpoint written under one strategy and number of ranks resumes under any other, in the middle of a rollout."""

from functools import partial

import pytest
import torch
from runs_of_tests import ADAM, STRATEGIES, assert_same_run
from safetensors.torch import load_file

from hybrid_lightning.callbacks import PolicyExport
from hybrid_lightning.export import MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.sharding.sharded_folder import read_folder
from hybrid_lightning.training import PolicyModule

# Two minibatches of a rollout: after one optimizer step one is left, and then comes a second rollout.
ARGUMENTS = {"policy": ADAM, "accumulate_grad_batches": 2}
SHARDED = partial(FSDP2Strategy, save_distributed_checkpoint=True)
WRITERS = {"one process": ("auto", 1), **{name: (strategy, 2) for name, strategy in STRATEGIES.items()}}
WRITERS |= {"fsdp2 sharded": (SHARDED, 3)}
READERS = {"one process": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": (SHARDED, 2)}
# The checkpoints, of other strategies or numbers of ranks, that each resumes.
CROSSINGS = {
    **{"one process": ("fsdp2 sharded",), "ddp": ("fsdp2",)},
    **{"fsdp2": ("one process", "ddp", "fsdp2 sharded")},
}
# What changes as they resume, all from the same checkpoint, except that DDP reads like one process.
ADAM_CHANGED = partial(torch.optim.AdamW, betas=(0.7, 0.8), eps=1e-3)
CHANGED = {"policy": {"lr_full": 1e-4, "lr_lora": 2e-2, "optimizer": ADAM_CHANGED}, "gradient_clip_val": 0.5}
pytestmark = pytest.mark.long
CHANGING = ("one process", "fsdp2")


@pytest.fixture(scope="module")
def runs(train_on, tmp_path_factory):
    """Where the writers' checkpoints after the first step are, and what each reader's ranks found: {name: result}."""
    root = tmp_path_factory.mktemp("saved")
    jobs = {"unstopped": (1, {**ARGUMENTS, "max_steps": 3})}  # name -> ranks, arguments
    for name, (strategy, ranks) in WRITERS.items():
        jobs[name] = ranks, {**ARGUMENTS, "strategy": strategy, "max_steps": 1, "save": root / f"{name}.ckpt"}
    jobs["fsdp2"][1]["callbacks"] = (PolicyExport(MergedModel("float32"), str(root / "live"), every_n_steps=1),)
    for reader, (strategy, ranks) in READERS.items():
        of_reader = {"strategy": strategy, "max_steps": 3}
        for writer in CROSSINGS[reader]:
            jobs[reader, writer] = ranks, {**ARGUMENTS, **of_reader, "ckpt_path": root / f"{writer}.ckpt"}
        if reader in CHANGING:
            jobs[reader, "changed"] = ranks, {**ARGUMENTS, **CHANGED, **of_reader, "ckpt_path": root / "fsdp2 sharded.ckpt"}
    found = {}
    # As many ranks do all of theirs one after the other: a start costs as much as a run. First all write, then all read.
    for reads, number in ((False, 1), (False, 3), (None, 2), (True, 1)):
        mine = {name: job for name, (ranks, job) in jobs.items() if ranks == number and reads in (None, isinstance(name, tuple))}
        results = train_on(number, mine)
        found |= {name: [result[name] for result in results] for name in mine}
    return root, found


@pytest.mark.parametrize("reader", READERS)
def test_it_resumes_as_if_it_had_not_been_stopped(runs, reader):
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


def test_each_rank_writes_a_part_of_its_own(runs):
    """No weight or moment is written twice, and no frozen weight at all."""
    path, ranks = runs[0] / "fsdp2 sharded.ckpt", WRITERS["fsdp2 sharded"][1]
    content = read_folder(path)
    moments = [value for entry in content["optimizer_states"][0]["state"].values() for value in entry.values()]
    size = 4 * sum(tensor.numel() for tensor in (*content["state_dict"].values(), *moments))
    files = {path.name: path.stat().st_size for path in path.iterdir() if path.suffix == ".distcp"}
    assert set(files) == {f"__{rank}_0.distcp" for rank in range(ranks)}
    tensors = 5 * len(content["state_dict"]) * ranks
    assert size < sum(files.values()) < size + 2000 * tensors, "torch adds a little to every part"


def test_one_process_loads_and_exports_what_several_have_written(runs):
    path, of_one = runs[0] / "fsdp2 sharded.ckpt", runs[0] / "one process.ckpt"
    parameters = dict(PolicyModule.load_from_checkpoint(path).named_parameters())
    weights = read_folder(path)["state_dict"]
    assert weights and all(torch.equal(parameters[name], value) for name, value in weights.items())
    policy, whole = policy_of_checkpoint(path), policy_of_checkpoint(of_one)
    assert policy.plan == whole.plan and policy.training == whole.training and policy.base.source == whole.base.source
    torch.testing.assert_close(policy.weights, whole.weights, atol=1e-5, rtol=0)


def test_a_split_model_is_exported_whole_while_it_is_trained(runs, tmp_path):
    """The model as exported from its checkpoint; the tests of `export` show that this is what was trained."""
    write_policy(policy_of_checkpoint(runs[0] / "fsdp2.ckpt"), MergedModel("float32"), tmp_path / "saved")
    live, later = (load_file(path / "model.safetensors") for path in (runs[0] / "live" / "step=1", tmp_path / "saved"))
    assert live.keys() == later.keys() and all(torch.equal(live[name], later[name]) for name in live)

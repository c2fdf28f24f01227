"""A checkpoint written under one strategy and number of ranks goes on under any other, in the middle of a rollout."""

from functools import partial

import pytest
import torch
from rounding import assert_same_logits
from runs_of_tests import ADAM, STRATEGIES, assert_same_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_lightning.callbacks import PolicyExport
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy
from hybrid_lightning.sharding.sharded_folder import read_folder

# Two passes over two minibatches: after one optimizer step three of a rollout are left, and after the fourth comes a second one.
ARGUMENTS = {"policy": {**ADAM, "epochs_per_rollout": 2}, "accumulate_grad_batches": 2}
SHARDED = {
    "fsdp2 sharded": partial(FSDP2Strategy, save_distributed_checkpoint=True),
    "fsdp1 sharded": partial(FSDP1Strategy, state_dict_type="sharded"),
}
WRITERS = {
    "one process": ("auto", 1),
    "ddp": ("ddp", 2),
    "fsdp2": (STRATEGIES["fsdp2"], 2),
    "fsdp1": (STRATEGIES["fsdp1"], 2),
    "fsdp2 sharded": (SHARDED["fsdp2 sharded"], 2),
    "fsdp1 sharded": (SHARDED["fsdp1 sharded"], 3),
}
READERS = {
    "one process": ("auto", 1),
    "ddp": ("ddp", 3),
    "fsdp2": (SHARDED["fsdp2 sharded"], 3),
    "fsdp1": (SHARDED["fsdp1 sharded"], 2),
}
# What is changed as they go on.
ADAM_CHANGED = partial(torch.optim.AdamW, betas=(0.7, 0.8), eps=1e-3)
CHANGED = {**ARGUMENTS["policy"], "lr_full": 1e-4, "lr_lora": 2e-2, "optimizer": ADAM_CHANGED}
# Which checkpoints each goes on from, of other strategies; but that DDP, which reads as one process does, all from that in parts,
# with other settings.
CROSSINGS = {"one process": ("fsdp1 sharded", "fsdp2 sharded"), "ddp": ("fsdp2",), "fsdp2": ("fsdp1",), "fsdp1": ("one process",)}
# Of bfloat16 weights, behind which there are float32 ones: the first trains; each of the others reads, without a step, what the
# one before has written, and writes it again. As many ranks follow each other.
HALF = {"policy": {**ADAM, "dtype": "bfloat16", "epochs_per_rollout": 2}, "precision": "bf16-true", "max_steps": 2}
HALF_CHAIN = ("one process", "fsdp2", "ddp", "fsdp1", "fsdp2 sharded", "fsdp1 sharded", "one process")


@pytest.fixture(scope="module")
def runs(train_on, tmp_path_factory):
    """Where the writers' checkpoints after the first step are, and what each reader's ranks found: {name: result}."""
    root = tmp_path_factory.mktemp("saved")
    write = {
        name: {**ARGUMENTS, "strategy": strategy, "max_steps": 1, "save": root / f"{name}.ckpt"}
        for name, (strategy, _) in WRITERS.items()
    }
    write["fsdp2"]["callbacks"] = (PolicyExport(MergedModel("float32"), str(root / "live"), every_n_steps=1),)
    ranks_of = {name: ranks for name, (_, ranks) in WRITERS.items()}
    read = {}
    for reader, (strategy, _) in READERS.items():
        for writer in CROSSINGS[reader]:
            paths = {"ckpt_path": root / f"{writer}.ckpt"}
            read[reader, writer] = {**ARGUMENTS, **paths, "strategy": strategy, "max_steps": 5}
        if reader == "ddp":
            continue
        flags = {"policy": CHANGED, "max_steps": 3, "gradient_clip_val": 0.5, "ckpt_path": root / "fsdp2 sharded.ckpt"}
        read[reader, "changed"] = {**ARGUMENTS, **flags, "strategy": strategy}
    ranks_of |= {name: READERS[name[0]][1] for name in read}
    for place, name in enumerate(HALF_CHAIN):
        strategy, ranks_of["half", place] = WRITERS[name]
        before = {"ckpt_path": root / f"half {place - 1}.ckpt"} if place else {}
        (write if place < len(HALF_CHAIN) - 1 else read)["half", place] = {
            **HALF,
            **before,
            "strategy": strategy,
            "save": root / f"half {place}.ckpt",
        }
    found = {}
    # As many ranks do all of theirs one after the other: a start costs as much as a run.
    ranks_of["unstopped"], write["unstopped"] = 1, {**ARGUMENTS, "max_steps": 5}
    for ranks, jobs in ((1, write), (2, write | read), (3, write | read), (1, read)):
        mine = {name: job for name, job in jobs.items() if ranks == ranks_of[name]}
        results = train_on(ranks, mine)
        found |= {name: [result[name] for result in results] for name in mine}
    return root, found


@pytest.fixture(scope="module")
def saved(runs):
    return runs[0]


@pytest.mark.parametrize("reader", READERS)
def test_it_goes_on_as_if_it_had_not_been_stopped(runs, reader):
    _, found = runs
    (unstopped,) = found["unstopped"]
    for writer in CROSSINGS[reader]:
        assert len(found[reader, writer]) == READERS[reader][1]
        for resumed in found[reader, writer]:
            assert resumed["global_step"] == 5 and len(resumed["steps"]) == 4, writer
            assert_same_run(resumed, unstopped, writer)


def test_what_is_changed_is_applied_under_every_strategy(runs):
    _, found = runs
    (expected,) = found["one process", "changed"]
    (unchanged,) = found["one process", "fsdp2 sharded"]
    assert expected["steps"][0]["loss"] == unchanged["steps"][0]["loss"] and expected["global_step"] == 3
    assert expected["steps"][1]["loss"] != unchanged["steps"][1]["loss"]
    for reader in ("one process", "fsdp2", "fsdp1"):
        for resumed in found[reader, "changed"]:
            for one, other in zip(resumed["steps"], expected["steps"], strict=True):
                assert one == pytest.approx(other, abs=1e-5, rel=1e-5), reader
            torch.testing.assert_close(resumed["weights"], expected["weights"], atol=1e-5, rtol=0)


def content_of(path):
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def test_it_holds_the_same_whoever_wrote_it(saved):
    contents = {name: content_of(saved / f"{name}.ckpt") for name in WRITERS}
    whole = contents["one process"]
    names = set(whole["state_dict"])
    (state,) = whole["optimizer_states"]
    assert set(state["state"]) == names == {name for group in state["param_groups"] for name in group["params"]}
    for name, content in contents.items():
        assert content.keys() == whole.keys(), name
        torch.testing.assert_close(content["state_dict"], whole["state_dict"], atol=1e-5, rtol=0)
        (other,) = content["optimizer_states"]
        torch.testing.assert_close(other["state"], state["state"], atol=1e-5, rtol=0)
        assert other["param_groups"] == state["param_groups"], name
        assert content["hybrid_lightning"] == whole["hybrid_lightning"], name


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_writes_a_part_of_its_own(saved, name):
    """Of weights and moments none is written twice, and no frozen one at all."""
    content = read_folder(saved / f"{name}.ckpt")
    moments = [value for entry in content["optimizer_states"][0]["state"].values() for value in entry.values()]
    size = 4 * sum(tensor.numel() for tensor in (*content["state_dict"].values(), *moments))
    files = {path.name: path.stat().st_size for path in (saved / f"{name}.ckpt").iterdir() if path.suffix == ".distcp"}
    assert set(files) == {f"__{rank}_0.distcp" for rank in range(WRITERS[name][1])}
    tensors = 5 * len(content["state_dict"]) * WRITERS[name][1]
    assert size < sum(files.values()) < size + 2000 * tensors, "torch adds a little to every part"


@pytest.mark.parametrize("name", ["fsdp2", *SHARDED])
def test_one_process_loads_and_exports_what_several_have_written(saved, name):
    loaded = PolicyModule.load_from_checkpoint(saved / f"{name}.ckpt")
    weights = content_of(saved / f"{name}.ckpt")["state_dict"]
    parameters = dict(loaded.named_parameters())
    assert weights and all(torch.equal(parameters[name], value) for name, value in weights.items())
    policy, whole = (policy_of_checkpoint(saved / f"{writer}.ckpt") for writer in (name, "one process"))
    assert policy.plan == whole.plan and policy.training == whole.training and policy.base == whole.base
    torch.testing.assert_close(policy.weights, whole.weights, atol=1e-5, rtol=0)


def test_a_split_model_is_exported_whole_while_it_is_trained(saved, tmp_path):
    policy = policy_of_checkpoint(saved / "fsdp2.ckpt")
    write_policy(policy, MergedModel("float32"), tmp_path / "saved")
    live, later = (load_file(path / "model.safetensors") for path in (saved / "live" / "step=1", tmp_path / "saved"))
    assert live.keys() == later.keys() and all(torch.equal(live[name], later[name]) for name in live)
    trained = PolicyModule.load_from_checkpoint(saved / "fsdp2.ckpt").model.eval()
    exported, ids = AutoModelForCausalLM.from_pretrained(saved / "live" / "step=1"), torch.tensor([[4, 5, 13, 6, 16]])
    with torch.no_grad():
        assert_same_logits(exported(ids).logits, trained(ids).logits)
    write_policy(policy, AdapterFolder(), tmp_path / "adapter")
    state, adapter = trained.state_dict(), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in policy.plan.full_modules:
        full = state[f"base_model.model.{name}.modules_to_save.default.weight"]
        assert torch.equal(adapter[f"base_model.model.{name}.weight"], full)


def test_no_half_of_a_bfloat16_weight_is_lost(saved):
    """It is read as it was written, by every strategy from another's."""
    first, *others = (content_of(saved / f"half {place}.ckpt") for place in range(len(HALF_CHAIN)))
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

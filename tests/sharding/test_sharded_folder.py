"""A folder is read as it was written; an incomplete one is refused with the reason."""

import os
from pathlib import Path
from pprint import pformat

import pytest
import torch
from ranks_of_tests import run
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.sharding import sharded_folder
from hybrid_lightning.sharding.sharded_folder import read_folder, read_meta, read_weights, write_folder


def content(value=1.0):
    weights = {"a.b.weight": torch.full((5, 3), value), "c.weight": torch.arange(4.0)}
    state = {name: {"step": torch.tensor(7.0), "exp_avg": weight / 2, "kind": "adam"} for name, weight in weights.items()}
    groups = [{"lr": 0.5, "params": list(weights)}]
    return {"state_dict": weights, "optimizer_states": [{"state": state, "param_groups": groups}], "global_step": 3}


def assert_same(one, other):
    assert pformat(one) == pformat(other)  # in which numbers of so few digits are exact, and keys in order


def test_everything_comes_back(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    write_folder(content(), path)
    assert_same(read_folder(path), content())
    weights = read_weights(path, lambda name: name.startswith("c"))
    assert weights["state_dict"].keys() == {"c.weight"}
    assert weights["optimizer_states"][0]["state"]["c.weight"] == {"kind": "adam"}
    assert "state_dict" not in read_meta(path) and read_meta(path)["global_step"] == 3
    write_folder(content(2.0), path)
    assert_same(read_folder(path), content(2.0))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
    alone = {name: value for name, value in content().items() if name != "optimizer_states"}
    write_folder(alone, path)
    assert_same(read_folder(path), alone)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


NONE = "cannot be read: it is not a sharded checkpoint, or incomplete"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", cut, "is incomplete: __0_0.distcp is cut short; give another checkpoint"),
        ("__0_0.distcp", Path.unlink, "is incomplete: __0_0.distcp is missing; give another checkpoint"),
        ("meta.pt", cut, NONE),
        ("meta.pt", Path.unlink, NONE),
        ("meta.pt", lambda path: torch.save([1], path), "is not a checkpoint: meta.pt is a list"),
        (".metadata", cut, NONE),
        (".metadata", Path.unlink, NONE),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, name, damage, message):
    path = tmp_path / "last.ckpt"
    write_folder(content(), path)
    damage(path / name)
    for read in (read_meta, read_folder, read_weights):
        with pytest.raises(CheckpointError, match=rf"last\.ckpt {message}"):
            read(path)


def test_a_part_that_is_damaged_inside_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    write_folder(content(), path)
    (path / "__0_0.distcp").write_bytes(bytes((path / "__0_0.distcp").stat().st_size))
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read: a part of it is damaged \(\w+\); give another one"):
        read_folder(path)


def fail(*arguments, **options):
    """Takes the place of what writes on one rank; gloo and the other rank know nothing of it."""
    raise OSError(28, "No space left on device")


def write_in_vain(path):
    """Write on two ranks; then again, where one of them cannot, by turns. What each rank hears, and what is left."""
    distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    split = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    write_folder({"state_dict": {"a": split}, "global_step": 1}, path)
    found = []
    failing = (sharded_folder, "put_in_place"), (torch.distributed.checkpoint.filesystem, "_write_files_from_queue")
    for of, (module, name) in enumerate(failing):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as raised:
            if distributed.get_rank() == of:
                patch.setattr(module, name, fail)
            write_folder({"state_dict": {"a": split}, "global_step": 2}, path)
        distributed.barrier()
        found.append((str(raised.value), read_folder(path)))
        distributed.barrier()
    distributed.destroy_process_group()
    return found


def test_all_ranks_hear_what_went_wrong_on_one_and_the_old_one_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    for rank in run(2, tmp_path / "ranks", write_in_vain, path=path):
        for message, left in rank:
            assert message.startswith(f"{path} could not be written: ") and "No space left on device" in message
            assert left["global_step"] == 1 and torch.equal(left["state_dict"]["a"], torch.arange(10.0).reshape(5, 2))


def test_ctrl_c_stays_what_it_is(tmp_path, monkeypatch):
    """Torch takes it for a failed write."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed.checkpoint.filesystem, "_write_files_from_queue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(content(), tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()

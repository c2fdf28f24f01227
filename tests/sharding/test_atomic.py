"""At every moment one of two files or folders is there whole, whatever is put in the place of what."""

import itertools
import os
import shutil
from unittest.mock import Mock

import pytest

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.sharding import atomic
from hybrid_lightning.sharding.atomic import discard, put_in_place, remove, replaced_path, unfinished_path
from hybrid_lightning.sharding.checkpoints import checkpoint_exists


class Killed(BaseException):
    """Stands for the signal: nothing is tidied up."""


def write(path, kind, text):
    if kind == "folder":
        path.mkdir()
        path /= "inside"
    path.write_text(text)


def read(path):
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize(
    ("old", "new"), [*itertools.product(("file", "folder", "link"), ("file", "folder")), ("nothing", "folder")]
)
def test_the_new_takes_the_name_and_killed_at_any_call_one_of_them_is_there_whole(tmp_path, old, new, monkeypatch):
    """Before each call that changes the disk, and in the middle of removing a folder."""
    killed_at, counter = 0, 0

    def countdown(function):
        def call(*arguments, **options):
            nonlocal counter
            counter += 1
            if counter == killed_at:
                if function is shutil.rmtree:
                    (arguments[0] / "inside").unlink()
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in ((type(tmp_path), "rename"), (type(tmp_path), "replace"), (type(tmp_path), "unlink")):
        monkeypatch.setattr(owner, name, countdown(getattr(owner, name)))
    for owner, name in ((atomic, "flush"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, countdown(getattr(owner, name)))
    linked = tmp_path / "step=1.ckpt"
    write(linked, "folder", "old")
    for killed_at in range(1, 12):
        path = tmp_path / str(killed_at) / "last.ckpt"
        path.parent.mkdir()
        if old == "link":  # as ModelCheckpoint(save_last="link") makes them
            path.symlink_to("../step=1.ckpt")
        elif old != "nothing":
            write(path, old, "old")
        write(unfinished_path(path), new, "new")
        counter = 0
        try:
            put_in_place(path)
        except Killed:
            pass
        else:
            break
        visible = {entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")}
        assert visible <= {"last.ckpt"}, "nothing else looks like a checkpoint"
        if path.exists():
            assert read(path) in ("old", "new")
        elif old != "nothing":
            assert read(replaced_path(path)) == "old"
            with pytest.raises(CheckpointError, match=r"last\.ckpt is missing, .* rename .*\.last\.ckpt\.replaced to last\.ckpt"):
                checkpoint_exists(path)
        counter = 100  # and the next writing tidies up
        discard(unfinished_path(path))
        write(unfinished_path(path), new, "newest")
        put_in_place(path)
        assert read(path) == "newest" and os.listdir(path.parent) == ["last.ckpt"]
    assert 1 < killed_at < 11, "the last time nothing was cut short"
    assert read(path) == "new" and not path.is_symlink() and os.listdir(path.parent) == ["last.ckpt"]
    assert read(linked) == "old"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "nothing"])
def test_what_is_removed_is_gone(tmp_path, kind):
    path = tmp_path / "step=1.ckpt"
    write(tmp_path / "other", "folder", "linked")
    if kind == "link":
        path.symlink_to("other")
    elif kind != "nothing":
        write(path, kind, "old")
    write(unfinished_path(path), "folder", "left by a process that was killed")
    remove(path)
    assert not path.exists() and not path.is_symlink() and read(tmp_path / "other") == "linked"


def test_a_folder_that_is_half_removed_has_no_name(tmp_path, monkeypatch):
    path = tmp_path / "step=2.ckpt"
    write(path, "folder", "old")
    monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        remove(path)
    assert not path.exists() and read(unfinished_path(path)) == "old"

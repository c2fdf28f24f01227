import multiprocessing
import time
from pathlib import Path

import pytest
from exported import files

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.write import check_target, new_folder


@pytest.mark.parametrize("empty", [True, False])
def test_the_folder_appears_when_it_is_whole(tmp_path, empty):
    target = tmp_path / "a" / "b" if not empty else tmp_path / "a"
    if empty:
        target.mkdir()
    with new_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "one.txt").write_text("1")
        assert not target.exists() or not any(target.iterdir())
        assert folder.parent == target.parent and folder.name.startswith(f".{target.name}.") and folder.suffix == ".partial"
    assert (target / "part" / "one.txt").read_text() == "1"
    assert files(target.parent) == {target.name}
    (tmp_path / "ordinary").mkdir()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, "others may read it"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as folder:
        (folder / "one.txt").write_text("1")
        raise error
    assert files(tmp_path) == set()


def write_slowly(target, writing):
    with new_folder(target) as folder:
        (folder / "config.json").write_text("half")
        writing.set()
        time.sleep(60)


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    processes = multiprocessing.get_context("fork")
    writing = processes.Event()
    process = processes.Process(target=write_slowly, args=(tmp_path / "out", writing))
    process.start()
    assert writing.wait(10)
    process.kill()
    process.join(10)
    (left,) = files(tmp_path)
    assert left.startswith(".out.") and left.endswith(".partial")
    with new_folder(tmp_path / "out") as folder:  # and it is in nobody's way
        (folder / "config.json").write_text("whole")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"


def test_what_is_there_is_never_overwritten(tmp_path):
    full, file, dangling = tmp_path / "full", tmp_path / "file", tmp_path / "dangling"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    dangling.symlink_to(tmp_path / "nowhere")
    for target, message in ((full, "is there and not empty; give a new folder"), (file, "is a file"), (dangling, "is a file")):
        with pytest.raises(ConfigError, match=message), new_folder(target):
            pytest.fail("this must not be reached")
    assert files(tmp_path) == {"full", "file", "dangling"} and (full / "mine.txt").read_text() == "mine"


def test_a_folder_that_another_process_filled_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ConfigError, match="not empty"), new_folder(target) as folder:
        (folder / "one.txt").write_text("ours")
        target.mkdir()
        (target / "one.txt").write_text("theirs")
    assert (target / "one.txt").read_text() == "theirs" and files(tmp_path) == {"out"}


def test_a_place_where_no_folder_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"/file is no folder that can be written to; give a folder elsewhere"):
        check_target(tmp_path / "file" / "x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ConfigError, match=r"cannot be made: .*Permission denied: 'there'; give a folder elsewhere"),
        new_folder(tmp_path / "x"),
    ):
        pass

import pytest
from exported import files

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.write import new_folder


@pytest.mark.parametrize("name", ["a", "a/b"])
def test_the_folder_appears_when_it_is_whole(tmp_path, name):
    target = tmp_path / name
    if name == "a":
        target.mkdir()
    with new_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "one.txt").write_text("1")
        assert not target.exists() or not any(target.iterdir())
        assert folder.parent == target.parent and folder.name.startswith(f".{target.name}.") and folder.suffix == ".partial"
    assert files(target) == {"part"} and (target / "part" / "one.txt").read_text() == "1" and files(tmp_path) == {"a"}
    for error in (OSError("no space left"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(tmp_path / "out") as folder:
            (folder / "one.txt").write_text("1")
            raise error
    assert files(tmp_path) == {"a"}


def test_what_is_there_is_never_overwritten(tmp_path):
    full, file, dangling, meanwhile = (tmp_path / name for name in ("full", "file", "dangling", "meanwhile"))
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    dangling.symlink_to(tmp_path / "nowhere")
    for target, message in (
        (full, "exists and is not empty; give a new folder"),
        (file, "is a file"),
        (dangling, "is a file"),
        (file / "x", r"/file is not a writable folder; give a folder elsewhere"),
    ):
        with pytest.raises(ConfigError, match=message), new_folder(target):
            pytest.fail("this must not be reached")
    with pytest.raises(ConfigError, match="not empty"), new_folder(meanwhile) as folder:
        (folder / "one.txt").write_text("ours")
        meanwhile.mkdir()
        (meanwhile / "one.txt").write_text("theirs, of another process")
    assert files(tmp_path) == {"full", "file", "dangling", "meanwhile"} and (full / "mine.txt").read_text() == "mine"
    assert (meanwhile / "one.txt").read_text().startswith("theirs")

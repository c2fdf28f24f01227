"""Exports are pushed to the hub, in training and from checkpoints; an impossible push is refused before the export is made."""

import shutil

import pytest
from cli_runs import assert_refused, done, run, write_folder
from huggingface_hub import constants
from small_hub import MEMBER, REVOKED, STRANGER, Hub
from stopped_runs import run_of

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.push import open_repository, push_folder

SMALL = ("fit", "--config=t.yaml", "--adapter.scorer=Random", "--trainer.max_steps=4", "--trainer.limit_val_batches=0")
EXPORTED = ("--trainer.callbacks=PolicyExport", "--trainer.callbacks.form=AdapterFolder", "--trainer.callbacks.every_n_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("pushed"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(written=tmp_path / "hub")
    with hub.connected(tmp_path / "home"):
        monkeypatch.setenv("HF_TOKEN", MEMBER)
        yield hub


def files(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(".gitattributes", None)
    return found


def test_a_run_and_a_checkpoint_are_pushed_whole(hub, folder):
    result = done(folder, *SMALL, *EXPORTED, "--trainer.callbacks.push_to=me/run")
    root = run_of(result, folder)
    pushed = hub.repositories["models", "me/run"]
    assert result.out.count(f"Pushed to {constants.ENDPOINT}/me/run\n") == 2, "after steps 2 and 4"
    assert files(pushed.folder) == files(next((root / "export").glob("*/step=4"))) and pushed.private
    given = ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt", "--folder=merged"]
    result = done(folder, "export", *given, "--push_to=run")
    assert f"Pushed to {constants.ENDPOINT}/me/run\n" in result.out
    assert files(pushed.folder) == files(folder / "merged"), "and nothing of the adapter is left"
    assert {"README.md", "config.json", "model.safetensors", "plan.json"} <= files(pushed.folder).keys()
    assert not any(MEMBER.encode() in content for content in files(folder).values())

    again = run(folder, "export", *given[:-1], "--folder=refused", "--push_to=other/run")
    assert_refused(again, "push_to='other/run': the hub token has no write access there")
    assert not (folder / "refused").exists()
    runs = set(folder.glob("runs/*/*"))
    assert_refused(
        run(folder, *SMALL, *EXPORTED, "--trainer.callbacks.push_to=other/run"), "has no write access there; give a token"
    )
    assert set(folder.glob("runs/*/*")) == runs, "before it trains"


def test_what_cannot_be_pushed_is_refused_by_its_cause(hub, tmp_path, monkeypatch):
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "weights.bin").write_text("w")
    hub.add("me/theirs", "models", theirs)
    (export := tmp_path / "export").mkdir()
    (export / "plan.json").write_text("{}")
    hub.add("other/export", "models", shutil.copytree(export, tmp_path / "copy"))
    for token, name, message in (
        (MEMBER, "me/theirs", r"has 1 files, such as weights.bin, but no plan.json: it is not an export"),
        (MEMBER, "other/export", "has no write access there"),
        (MEMBER, "a/b/c", "HFValidationError: Repo id must be"),
        (STRANGER, "me/new", r"has no write access there; give a token with write access by HF_TOKEN or 'hf auth login'"),
        (REVOKED, "me/new", "has no write access there"),
        ("", "me/new", "needs a hub token; give a token with write access"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError, match=message) as caught:
            open_repository(name)
        assert not token or token not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert open_repository("new") == "me/new" == open_repository("me/new"), "made once"
    monkeypatch.setenv("HF_TOKEN", REVOKED)
    with pytest.raises(ConfigError, match=rf"; the export is in {export}, and 'hf upload me/new {export}' pushes it"):
        push_folder(export, "me/new", "Step 1")
    hub.reachable = False
    with pytest.raises(ConfigError, match="'me/new': ConnectError: no network"):
        open_repository("me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it, or leave push_to out"):
        open_repository("me/new")

import traceback
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.callbacks.graceful_stop import lost_contact
from hybrid_lightning.callbacks.run_folder import RunFolder


def trainer(saved=None, resumed=None, folder=None):
    callback = None if saved is None else ModelCheckpoint()
    if callback is not None:
        callback._last_checkpoint_saved, callback.last_model_path = saved, "runs/being_written.ckpt"
    holder = RunFolder()
    holder.path = folder
    return SimpleNamespace(global_rank=3, world_size=4, checkpoint_callback=callback, ckpt_path=resumed, callbacks=[holder])


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:44417: Connection reset by peer",
        "NCCL communicator was aborted on rank 1.",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 600000 milliseconds before timing out.",
    ],
)
def test_it_names_the_cause_and_the_checkpoint(text):
    message = lost_contact(trainer("runs/last.ckpt", "old.ckpt"), RuntimeError(text))
    assert message.startswith("rank 3 lost contact") and message.endswith("--ckpt_path runs/last.ckpt") and "\n" not in message
    assert lost_contact(trainer("", "old.ckpt"), RuntimeError(text)).endswith("--ckpt_path old.ckpt")
    assert lost_contact(trainer(), RuntimeError(text)).endswith("no checkpoint has been saved yet")
    assert lost_contact(trainer(""), RuntimeError(text)).endswith("no checkpoint has been saved yet")


def test_under_the_command_line_it_is_the_command(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "config.yaml").touch()
    message = lost_contact(trainer("last.ckpt", folder=folder), RuntimeError("Connection reset by peer"))
    assert message.endswith(f" -m hybrid_lightning fit --config '{folder}/config.yaml' --ckpt_path last.ckpt")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("Connection reset by peer"), KeyboardInterrupt()])
def test_other_errors_are_a_processs_own(error):
    assert lost_contact(trainer(), error) is None


def test_it_is_said_at_once_and_at_the_end_of_the_traceback(capsys):
    error = RuntimeError("Connection closed by peer [127.0.0.1]:22445")
    GracefulStop().on_exception(trainer("runs/last.ckpt"), None, error)
    line = capsys.readouterr().err
    assert line.startswith("rank 3 lost contact") and "".join(traceback.format_exception(error)).endswith(line)

from types import SimpleNamespace

import pytest

from hybrid_lightning.callbacks.lost_contact import lost_contact


def trainer(**saved):
    return SimpleNamespace(global_rank=3, checkpoint_callback=SimpleNamespace(**saved) if saved else None)


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:44417: Connection reset by peer",
        "NCCL communicator was aborted on rank 1.",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 600000 milliseconds before timing out.",
    ],
)
def test_it_names_the_cause_and_the_checkpoint(text):
    message = lost_contact(trainer(last_model_path="runs/last.ckpt", best_model_path="runs/best.ckpt"), RuntimeError(text))
    assert message.startswith("rank 3 lost contact") and message.endswith("--ckpt_path runs/last.ckpt") and "\n" not in message
    assert lost_contact(trainer(last_model_path="", best_model_path="b.ckpt"), RuntimeError(text)).endswith("b.ckpt")
    assert lost_contact(trainer(), RuntimeError(text)).endswith("no checkpoint has been saved yet")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("Connection reset by peer"), KeyboardInterrupt()])
def test_other_errors_are_a_processs_own(error):
    assert lost_contact(trainer(), error) is None

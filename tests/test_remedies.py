"""What libraries say of devices and disks ends with a remedy."""

import errno
import os
from unittest.mock import Mock

import pytest
from cli_runs import assert_refused, run
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hybrid_lightning.remedies import is_machine_error, with_remedy


def test_a_machine_without_a_gpu_says_what_to_give(folder, monkeypatch):
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    no_gpu = Mock(side_effect=MisconfigurationException("No supported gpu backend found!"))
    monkeypatch.setattr(_AcceleratorConnector, "_choose_gpu_accelerator_backend", no_gpu)
    result = run(folder, "fit", "--config", "t.yaml", "--trainer.accelerator=gpu")
    remedy = "give --trainer.accelerator=cpu, or auto for the best that is there"
    assert_refused(result, f"^error: trainer: .*; no such device is found here: {remedy}$")
    said = "You requested gpu: [0, 1]\n But your machine only has: [0]"
    assert with_remedy(said).endswith("; give --trainer.devices=auto for all that are there, or fewer")


@pytest.mark.parametrize(
    ("error", "of_machine", "another_place"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/x"), True, True),
        (OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "runs/x"), True, False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True, True),  # a write tells of no file
        (OSError(errno.EACCES, "no file is named"), False, False),
        (KeyError("x"), False, False),
        (TimeoutError(110, "x", "y"), False, False),
    ],
)
def test_what_the_machine_refuses_is_no_mistake_of_ours(error, of_machine, another_place):
    assert is_machine_error(error) == of_machine
    assert with_remedy(str(error)).endswith("--trainer.logger.save_dir=FOLDER") == another_place

import logging
import os
import sys
import warnings

import fork_server
import torch
from test_running import play

from hybrid_lightning.environments import Environment, Step
from hybrid_lightning.environments.process_state import ProcessSettings


class Settings(Environment):
    """Changes what is the whole process's."""

    def step(self, message):
        if message["content"] == "leave":
            os._exit(0)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        sys.stdout = sys.stderr = None
        logging.disable()
        warnings.simplefilter("error")
        return Step()


def test_settings_of_the_process_are_put_back_and_that_is_said_once(caplog):
    before = ProcessSettings()
    play(Settings(), "now", "now")
    assert not before.restore()
    (record,) = caplog.records
    assert record.message.startswith("Settings changes torch.set_default_dtype, torch.set_float32_matmul_precision, torch.use_")
    assert "logging.disable, warnings for the whole process, which is undone after each answer" in record.message


def test_a_process_that_an_environment_ends_has_not_succeeded_and_says_whose_code_it_was():
    code = "import test_process_state as t; t.play(t.Settings(), 'leave', seeds=[1])"
    done = fork_server.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.returncode == 1 and "error: Settings has ended the process by os._exit(0); let it raise" in done.stderr

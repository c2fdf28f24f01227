"""What environments change for the whole process is put back; see `test_running` for what is said of it."""

import os
import random
import subprocess
import sys

import numpy as np
import torch

from hybrid_lightning.environments.process_state import ProcessSettings, RandomStates


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_from_their_states_and_the_same_seed_gives_the_same():
    ours = RandomStates.now()
    RandomStates.from_seed(5).restore()
    first = drawn()
    assert not RandomStates.now().same(RandomStates.from_seed(5))
    RandomStates.from_seed(5).restore()
    assert drawn() == first
    ours.restore()
    assert RandomStates.now().same(ours)


def test_only_settings_that_have_changed_are_set_back():
    before = ProcessSettings()
    assert before.restore() == []
    torch.set_default_dtype(torch.float64)
    assert before.restore() == ["torch.set_default_dtype"] and torch.get_default_dtype() == torch.float32


def test_a_thread_that_ends_the_process_says_whose_code_it_is():
    code = (
        "import os, threading\nfrom hybrid_lightning.environments.process_state import exits_said\n"
        "with exits_said('Game'):\n    thread = threading.Thread(target=os._exit, args=(0,))\n    thread.start()\n"
        "    thread.join()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert ended.returncode == 1 and "error: Game has ended the process by os._exit(0); let it raise" in ended.stderr

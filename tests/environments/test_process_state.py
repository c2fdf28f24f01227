"""Random states go on; that settings are put back, and `os._exit` is said, is seen in `test_running`."""

import random

import numpy as np
import torch

from hybrid_lightning.environments.process_state import RandomStates


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

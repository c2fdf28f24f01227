"""vLLM in the training process changes nothing there."""

import gc
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from vllm_of_tests import largest_difference, needs_vllm, policy_of, write_model

from hybrid_lightning.rollout import VLLMSampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.vllm.isolated_process import IsolatedProcess, _memory_policy
from hybrid_lightning.types import Prompt

PROMPTS = [Prompt(text="12+3=")]


def state():
    """What vLLM changes, or might change, in a process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "distributed": dist.is_initialized(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)],
        "cores": os.sched_getaffinity(0),
        "memory": None if _memory_policy() is None else (_memory_policy()[0], list(_memory_policy()[1])),
        "environment": {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"},
        "excepthook": sys.excepthook,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "recursion": sys.getrecursionlimit(),
    }


@needs_vllm
def test_a_process_is_the_same_after_an_engine_was_made_used_updated_and_ended_in_it(tmp_path):
    sampler = VLLMSampler(max_new_tokens=8)
    policy = policy_of(sampler, write_model(tmp_path / "model"), "hybrid")
    policy.task.generation._stops  # noqa: B018  (made before, since imports are not what is tested)
    moments, frozen = [state()], gc.get_freeze_count()
    policy.generate(PROMPTS, 2, PromptDraws(PROMPTS, 2, 0))
    moments.append(state())
    assert gc.get_freeze_count() <= frozen, "vLLM would freeze all objects that there are"
    sampler.shut_down()
    assert largest_difference(policy, policy.generate(PROMPTS, 2, PromptDraws(PROMPTS, 2, 0))) < 1e-4, "by a second engine"
    sampler.shut_down()
    for name in moments[0]:
        assert moments[0][name] == moments[1][name], name


def test_what_vllm_changes_is_put_back_after_an_error_too_and_given_to_it_again(monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "ours")
    process = IsolatedProcess({"OF_VLLM": "1"})
    before = state()
    with process.entered():
        assert os.environ["OF_VLLM"] == "1"
        os.environ["A_VARIABLE"] = "changed"
        del os.environ["PATH"]
        torch.manual_seed(5)
        drawn = torch.rand(1), random.random(), np.random.rand()
        torch.set_num_threads = print
        torch.set_default_dtype(torch.float64)
        sys.excepthook = print
        sys.setrecursionlimit(before["recursion"] + 1000)
        freeze = gc.get_freeze_count()
        gc.freeze()
        assert gc.get_freeze_count() <= freeze
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert state() == before and drawn
    with pytest.raises(ValueError, match="of vLLM"), process.entered():
        assert os.environ["A_VARIABLE"] == "changed" and "PATH" not in os.environ
        assert torch.set_num_threads is print and dist.is_initialized()
        with process.with_own_groups():
            assert not dist.is_initialized()
        assert dist.is_initialized()
        dist.destroy_process_group()
        raise ValueError("of vLLM")
    assert state() == before


STOPPED = """
import sys
from vllm_of_tests import policy_of
from hybrid_lightning.rollout import VLLMSampler
from hybrid_lightning.types import Prompt
policy_of(VLLMSampler(max_new_tokens=4), sys.argv[1]).generate([Prompt(text="12+3=")])
sys.exit(143)
"""


@needs_vllm
def test_a_process_that_ends_without_ending_its_engine_says_nothing_of_it(tmp_path):
    """As a run does that a signal has stopped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", STOPPED, str(write_model(tmp_path / "model"))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr[-2000:]

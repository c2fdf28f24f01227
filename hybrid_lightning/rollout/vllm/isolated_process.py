"""`IsolatedProcess`: lets vLLM work in the training process without changing it.

vLLM assumes that it owns the process. It seeds Python's, NumPy's and torch's global generators, replaces `torch.set_num_threads`,
creates a default process group or adds groups to an existing one, freezes the garbage collector, binds memory to NUMA nodes, and
sets environment variables such as LD_PRELOAD. Training would then draw other numbers, believe that it is distributed, or pass
those variables to processes that it starts. So every call of vLLM is made within `entered`. It gives vLLM its own world, kept
from call to call, and restores everything afterwards.
"""

import ctypes
import gc
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch.distributed import distributed_c10d

from hybrid_lightning.rollout.rng import capture_random_state, restore_random_state

# Numbers of the system calls (get_mempolicy, set_mempolicy); glibc has no functions for them.
_MEMORY_POLICY = {"x86_64": (239, 238), "aarch64": (236, 237)}
_NODES = 1024  # bits of a mask of NUMA nodes


class IsolatedProcess:
    """The process state that vLLM expects, put in place while vLLM works.

    Args:
        environment: Variables for vLLM in addition to the process's own; None hides a variable from it.
    """

    def __init__(self, environment: Mapping[str, str | None]) -> None:
        self._environment = dict(environment)
        self._world: Any = _World()
        self._outside: Any = None  # training's state, while vLLM works
        self._random: dict[str, Any] | None = None
        self._set_threads: Any = torch.set_num_threads
        self._within = False

    def set(self, **variables: str) -> None:
        """Set environment variables for vLLM only."""
        assert self._within
        os.environ.update(variables)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Give the process to vLLM within this context; nested contexts change nothing."""
        if self._within:
            yield
            return
        self._within = True
        before = dict(os.environ)
        random, threads, set_threads = capture_random_state(), torch.get_num_threads(), torch.set_num_threads
        self._outside, groups = distributed_c10d._world, distributed_c10d._group_count
        policy, freeze, depth = _memory_policy(), gc.freeze, sys.getrecursionlimit()  # torch's compiler raises the limit
        dtype, hook = torch.get_default_dtype(), sys.excepthook  # torch replaces the hook with the first process group
        _set_environment(self._environment)
        if self._random is not None:
            restore_random_state(self._random)
        _enter_world(self._world)
        torch.set_num_threads = self._set_threads
        gc.freeze = lambda: None  # newly frozen objects could not be distinguished from earlier ones
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's warnings about vLLM's calls, which users cannot act on
                yield
        finally:
            _enter_world(self._outside)
            if distributed_c10d._group_count < groups:  # vLLM has ended its default group, and torch then forgets all groups
                distributed_c10d._group_count = groups
                for group, name in self._outside.pg_names.items():
                    distributed_c10d._register_process_group(name, group)
            self._random, self._set_threads = capture_random_state(), torch.set_num_threads
            restore_random_state(random)
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            sys.excepthook = hook
            gc.freeze = freeze
            sys.setrecursionlimit(depth)
            _restore_memory_policy(policy)
            self._environment = _changes(before, dict(os.environ))
            _set_environment(_changes(dict(os.environ), before))
            self._within = False

    @contextmanager
    def with_own_groups(self) -> Iterator[None]:
        """Restore training's process groups within this context, inside `entered`."""
        _enter_world(self._outside)
        try:
            yield
        finally:
            _enter_world(self._world)

    def end_groups(self) -> None:
        """End vLLM's process groups, inside `entered`; torch's `destroy_process_group` would end training's, too."""
        assert self._within
        for group in list(self._world.pg_map):
            group.shutdown()
            distributed_c10d._unregister_process_group(self._world.pg_names[group])
        self._world = _World()
        _enter_world(self._world)


class _World(distributed_c10d._World):
    """Process groups separate from the existing ones; torch has this class so that it can be replaced.

    Groups are distinguished by numbers, which continue across all worlds.
    """

    pg_map = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]
    pg_names = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]
    pg_group_ranks = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]
    pg_backend_config = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]
    tags_to_pg = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]
    pg_to_tag = cached_property(lambda self: dict[Any, Any]())  # type: ignore[assignment]


def _enter_world(world: Any) -> None:
    distributed_c10d._world = world
    group = world.default_pg
    torch._C._distributed_c10d._set_global_rank(-1 if group is None else group.rank())  # torch's logs name it


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """Changes from one environment to another: name -> value, None for a variable that is gone."""
    gone: dict[str, str | None] = {name: None for name in before if name not in after}
    return gone | {name: value for name, value in after.items() if before.get(name) != value}


def _set_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _memory_policy() -> tuple[int, Any] | None:
    """The kernel's policy for placing this thread's memory on NUMA nodes; None if it is unknown."""
    numbers = _MEMORY_POLICY.get(platform.machine())
    if numbers is None or platform.system() != "Linux" or threading.current_thread() is not threading.main_thread():
        return None
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * (_NODES // 64))()
    with suppress(OSError, AttributeError):
        if ctypes.CDLL(None).syscall(numbers[0], ctypes.byref(mode), mask, ctypes.c_ulong(_NODES), None, 0) == 0:
            return mode.value, mask
    return None


def _restore_memory_policy(policy: tuple[int, Any] | None) -> None:
    if policy is not None and policy != _memory_policy():
        mode, mask = policy
        number = _MEMORY_POLICY[platform.machine()][1]
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, mode, mask if any(mask) else None, ctypes.c_ulong(_NODES))

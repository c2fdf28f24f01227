"""One seed gives the same bits however busy the machine is, on several threads, under every strategy, and after a resume."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_examples
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks_of_tests import run
from runs_of_tests import weights
from tiny_runs import build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.adapters import Random, TailEnergy
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.sharding import FSDP2Strategy

# More than many machines have, so that all of torch's own chunks of a tensor are shared, and their ends come in any order.
THREADS = 4
STEPS = 2
ADAM = {"optimizer": partial(torch.optim.AdamW, betas=(0.9, 0.99)), "lr_full": 1e-3, "lr_lora": 1e-2}


# Each ends with the process that started it, should that be killed, and in any case after two minutes.
_WORK = """
import os, time
parent, end = os.getppid(), time.monotonic() + 120
while os.getppid() == parent and time.monotonic() < end:
    sum(range(100_000))
"""


@contextmanager
def busy_machine(processes_a_core: int) -> Iterator[None]:
    """Within this context, this many processes a core compute."""
    count = processes_a_core * len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-I", "-S", "-c", _WORK]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


class EvenShare(RewardFunction):
    """Share of even digits in the completion. It differs among the completions of any prompt."""

    def __call__(self, completions, prompts):
        return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


def made(kind: str, folder: Path) -> tuple[Any, Any]:
    """Module and data; passes are of so many tokens that threads share the work on them, most with one prompt."""
    if kind != "policy":
        module = tiny_examples.build_module(kind, folder / "model", examples_per_step=32, **ADAM)
        return module, tiny_examples.build_examples(kind, folder / "rows.jsonl")
    sizes = {"prompts_per_rollout": 2, "samples_per_prompt": 128, "minibatches_per_rollout": 2}
    module = build_policy(folder / "model", loss=GSPOLoss(), reward=EvenShare(), sampler=Sampler(8), **sizes, **ADAM)
    return module, build_data(folder / "products.jsonl")


def differences(folder: Path, root: Path, repeats: dict[str, int], strategy: Any = "auto", devices: int = 1) -> list[str]:
    """Weights that differ from run to run of each kind, repeated so often, or else resumed after the first step."""
    torch.set_num_threads(THREADS)
    found = []
    for kind, times in repeats.items():

        def train(case: str, ckpt_path: Path | None = None, kind: str = kind, times: int = times) -> dict[str, Any]:
            torch.manual_seed(11)
            module, data = made(kind, folder)
            # A resumed run takes the plan that it finds: modules are scored where a run is repeated.
            adapter = build_adapter(calibration_prompts=2, scorer=TailEnergy() if times else Random())
            saver = ModelCheckpoint(root / kind / case, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            flags = {"max_steps": STEPS, "gradient_clip_val": 1.0, "limit_val_batches": 0, "enable_checkpointing": True}
            flags |= {"strategy": strategy() if callable(strategy) else strategy, "devices": devices}
            trainer = build_trainer(root / kind, adapter, saver, **flags)
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
            return weights(module)

        first = train("first")
        assert all(bool(value.any()) for name, value in first.items() if "lora_B" in name), "all of it was trained"
        others = {case: train(case) for case in (f"repeated, {number}" for number in range(times))}
        if not times:
            others["resumed"] = train("resumed", root / kind / "first" / "step=1.ckpt")
        for case, other in others.items():
            assert first.keys() == other.keys()
            found += [f"{kind}, {case}: {name}" for name, value in first.items() if not torch.equal(value, other[name])]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_seed")
    shutil.copytree(embedded_policy_path(), folder / "model")
    # Products that this model answers in many ways, and signs that it knows.
    products = [(100 + 37 * number, 13 + number) for number in range(24)]
    rows = (f'{{"question": "{a}*{b}=", "answer": "{a * b}"}}' for a, b in products)
    (folder / "products.jsonl").write_text("\n".join(rows))
    examples = tiny_examples.write_rows(folder / "rows.jsonl", 64)
    examples.write_text(examples.read_text().replace("+", "*"))
    run(1, folder / "server", os.getpid, timeout_s=240)  # so that all is imported before the machine is busy
    return folder


CASES = {
    "one process": {"repeats": {"policy": 1, "supervised": 0, "preference": 0}},
    "ddp": {"repeats": {"policy": 0}, "strategy": "ddp", "devices": 2},
    "fsdp2": {"repeats": {"policy": 0}, "strategy": FSDP2Strategy, "devices": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_runs_are_equal_on_a_busy_machine(folder, tmp_path, case):
    ranks = CASES[case].get("devices", 1)
    # Found by one as by two in each of several tries, but that DDP's fault took two.
    with busy_machine(processes_a_core=2 if case == "ddp" else 1):
        found = run(ranks, tmp_path / "ranks", differences, timeout_s=240, folder=folder, root=tmp_path / "run", **CASES[case])
    assert not any(found), found

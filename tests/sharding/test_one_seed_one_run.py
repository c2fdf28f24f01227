"""One seed gives the same bits however busy the machine is, on several threads, under every strategy, and after a resume."""

import os
import shutil

import pytest
from busy import busy_machine
from ranks_of_tests import run
from repeated_runs import differences
from tiny_examples import write_rows

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_seed")
    shutil.copytree(embedded_policy_path(), folder / "model")
    # Products that this model answers in many ways, and signs that it knows.
    products = [(100 + 37 * number, 13 + number) for number in range(24)]
    rows = (f'{{"question": "{a}*{b}=", "answer": "{a * b}"}}' for a, b in products)
    (folder / "products.jsonl").write_text("\n".join(rows))
    examples = write_rows(folder / "rows.jsonl", 64)
    examples.write_text(examples.read_text().replace("+", "*"))
    run(1, folder / "server", os.getpid, timeout_s=240)  # so that all is imported before the machine is busy
    return folder


CASES = {
    "one process": {"repeats": {"policy": 1, "supervised": 0, "preference": 0}},
    "ddp": {"repeats": {"policy": 0}, "strategy": "ddp", "devices": 2},
    "fsdp2": {"repeats": {"policy": 0}, "strategy": FSDP2Strategy, "devices": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_runs_are_equal_on_a_busy_machine(folder, tmp_path, case):
    ranks = CASES[case].get("devices", 1)
    # Found by one as by two in each of several tries, but that DDP's fault took two.
    with busy_machine(processes_a_core=2 if case == "ddp" else 1):
        found = run(ranks, tmp_path / "ranks", differences, timeout_s=240, folder=folder, root=tmp_path / "run", **CASES[case])
    assert not any(found), found

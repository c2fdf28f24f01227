"""Names of packages that are imported when they are first used."""

import subprocess
import sys
from importlib import import_module

import pytest

import hybrid_lightning
from hybrid_lightning.shared.configurable import public_path

ROOMS = (
    "adapters",
    "callbacks",
    "data",
    "environments",
    "metrics",
    "model",
    "rewards",
    "rollout",
    "runner",
    "sharding",
    "training",
)


def test_a_script_imports_its_ten_names_from_the_package():
    expected = {
        *("PolicyModule", "SupervisedModule", "PreferenceModule", "HybridAdapterSetup", "Trainer"),
        *("GRPOLoss", "GSPOLoss", "PromptDataModule", "Sampler", "FunctionReward"),
    }
    assert set(hybrid_lightning.__all__) == expected <= set(dir(hybrid_lightning))
    paths = {public_path(getattr(hybrid_lightning, name)) for name in expected}
    assert {"hybrid_lightning.losses.GSPOLoss", "hybrid_lightning.training.PolicyModule"} <= paths, "files name the room"
    assert not paths & {f"hybrid_lightning.{name}" for name in expected}


def test_the_package_and_its_rooms_import_nothing_until_they_are_used():
    rooms = ", ".join(f"hybrid_lightning.{room}" for room in ROOMS)
    code = f"import sys, {rooms}; print({{'torch', 'lightning', 'transformers', 'peft'}} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_stub_is_there(room):
    package = import_module(f"hybrid_lightning.{room}")
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module 'hybrid_lightning.{room}' has no attribute 'Missing'"):
        _ = package.Missing

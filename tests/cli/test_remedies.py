"""Libraries' errors about devices and disks end with a remedy, and configs of different kinds are not overlays."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from cli_runs import assert_refused, run
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hybrid_lightning.cli.remedies import check_whole_configs, is_machine_error, with_remedy
from hybrid_lightning.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
KIND = {"sft": "SupervisedModule", "dpo": "PreferenceModule"}


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
def test_what_the_machine_refuses_is_not_our_mistake(error, of_machine, another_place):
    assert is_machine_error(error) == of_machine
    assert with_remedy(str(error)).endswith("--trainer.logger.save_dir=FOLDER") == another_place


def test_a_config_of_another_kind_is_not_an_overlay(folder):
    for first, second in (("gspo", "sft"), ("sft", "dpo"), ("dpo", "qwen3")):
        given = ["fit", "--config", f"{CONFIGS}/{first}.yaml", f"--config={CONFIGS}/{second}.yaml"]
        kinds = [KIND.get(name, "PolicyModule") for name in (first, second)]
        said = rf"{first}\.yaml trains a {kinds[0]}, but .*{second}\.yaml trains a {kinds[1]}; give one of"
        with pytest.raises(ConfigError, match=said):
            check_whole_configs(given)
    assert_refused(run(folder, *given), f"error: --config {CONFIGS}/{said}")
    assert not (folder / "runs").exists()


def test_a_module_of_ones_own_and_files_that_say_nothing_are_left_alone_but_a_class_alone_counts(tmp_path):
    for name, text in {"own": "model: mine.MyPolicy", "list": "- a", "broken": "a: [", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    others = [f"--config={path}" for path in tmp_path.iterdir()]
    overlays = [f"--config={path}" for path in CONFIGS.glob("*/*.yaml")]
    check_whole_configs(["fit", f"--config={CONFIGS}/gspo.yaml", *overlays, *others, "--config"])
    (tmp_path / "switch.yaml").write_text("model: SupervisedModule")
    with pytest.raises(ConfigError, match=r"gspo\.yaml trains a PolicyModule, but .*switch\.yaml trains a SupervisedModule"):
        check_whole_configs(["fit", f"--config={CONFIGS}/gspo.yaml", "-c", f"{tmp_path}/switch.yaml"])

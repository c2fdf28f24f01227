"""What libraries say of devices and disks ends with a remedy, and configs of different kinds are no overlays."""

import errno
import os
from pathlib import Path

import pytest
from cli_runs import assert_refused, run
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.remedies import check_whole_configs, is_machine_error, with_remedy

CONFIGS = Path(__file__).parents[1] / "configs"
KIND = {"sft": "SupervisedModule", "dpo": "PreferenceModule"}
WHOLE = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.glob("*/*.yaml"))


def no_gpu():
    raise MisconfigurationException("No supported gpu backend found!")


def test_a_machine_without_a_gpu_says_what_to_give(folder, monkeypatch):
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(_AcceleratorConnector, "_choose_gpu_accelerator_backend", staticmethod(no_gpu))
    said = (
        "^error: trainer: .*; no such device is found here: give --trainer.accelerator=cpu, or auto for the best that is there$"
    )
    assert_refused(run(folder, "fit", "--config", "t.yaml", "--trainer.accelerator=gpu"), said)


def test_a_machine_with_fewer_gpus_says_what_to_give():
    said = "You requested gpu: [0, 1]\n But your machine only has: [0]"
    assert with_remedy(said).endswith("; give --trainer.devices=auto for all that are there, or fewer")


@pytest.mark.parametrize("name", ["EACCES", "ENOSPC", "ENOTDIR"])
def test_what_the_machine_refuses_is_no_mistake_of_ours(name):
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "runs/x")
    assert is_machine_error(error) and "runs/x" in with_remedy(str(error))
    assert is_machine_error(OSError(number, os.strerror(number))) == (name == "ENOSPC"), "a write tells of no file"
    assert ("--trainer.logger.save_dir=FOLDER" in with_remedy(str(error))) == (name in ("EACCES", "ENOSPC"))


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no file is named"), OSError("x"), KeyError("x"), TimeoutError(110, "x", "y")]
)
def test_other_errors_keep_their_traceback(error):
    assert not is_machine_error(error) and with_remedy(str(error)) == str(error)


@pytest.mark.parametrize(("first", "second"), [("gspo", "sft"), ("sft", "dpo"), ("dpo", "qwen3")])
def test_a_config_of_another_kind_is_no_overlay(first, second):
    given = ["fit", "--config", f"{CONFIGS}/{first}.yaml", f"--config={CONFIGS}/{second}.yaml"]
    kinds = [KIND.get(name, "PolicyModule") for name in (first, second)]
    with pytest.raises(
        ConfigError, match=rf"{first}\.yaml trains a {kinds[0]} and .*{second}\.yaml a {kinds[1]}: .* give one of"
    ):
        check_whole_configs(given)


def test_it_is_refused_on_the_command_line(folder):
    result = run(folder, "fit", "-c", f"{CONFIGS}/gspo.yaml", "-c", f"{CONFIGS}/sft.yaml")
    assert_refused(result, f"error: --config {CONFIGS}/gspo.yaml trains a PolicyModule and")
    assert not (folder / "runs").exists()


def test_overlays_lie_on_every_config():
    check_whole_configs(["fit", "--config", f"{CONFIGS}/qwen3.yaml", f"--config={CONFIGS}/gspo.yaml"])
    for base in WHOLE:
        for overlay in OVERLAYS:
            check_whole_configs(["fit", "--config", f"{CONFIGS}/{base}.yaml", "-c", f"{CONFIGS}/{overlay}"])


def test_a_module_of_ones_own_and_files_that_say_nothing_are_left_alone(tmp_path):
    for name, text in {"own": "model: mine.MyPolicy", "list": "- a", "broken": "a: [", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    check_whole_configs(
        ["fit", f"--config={CONFIGS}/gspo.yaml", *(f"--config={path}" for path in tmp_path.iterdir()), "--config"]
    )


def test_a_class_alone_over_another_config_counts(tmp_path):
    (tmp_path / "switch.yaml").write_text("model: SupervisedModule")
    with pytest.raises(ConfigError, match=r"gspo\.yaml trains a PolicyModule and .*switch\.yaml a SupervisedModule"):
        check_whole_configs(["fit", f"--config={CONFIGS}/gspo.yaml", f"--config={tmp_path}/switch.yaml"])

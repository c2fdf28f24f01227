"""`CurrentWeights`: the weights that a policy currently computes with, by the names of its base model, for rollout engines.

    fully trained module     the trained weight and bias
    module with LoRA         weight with the update merged into it, in float32; its bias
    quantized module         the dequantized weight
    any other module         as it is

An engine that receives LoRA separately gets the base's weights, and the factors A and B of each module by PEFT's names.

Engines join modules with the same input into one layer (q/k/v, gate/up). A layer that receives only some of its parts would be
silently wrong. So weights are grouped by the parts of a decoder block (`layers.3.self_attn`, `layers.3.mlp`), which no engine
joins, and each group comes as a whole or not at all.

Engines read checkpoints, so each weight has the name and form that it has in a checkpoint: weights of a wrapper's text part have
a prefix, and experts that transformers joins when it reads a checkpoint are split again.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from hybrid_lightning.adapters.apply import lora_layers
from hybrid_lightning.adapters.candidates import is_experts, is_transposed, linear_shape
from hybrid_lightning.adapters.lora_settings import ADAPTER
from hybrid_lightning.adapters.merge import LowRankUpdate, write_merged
from hybrid_lightning.rollout.interface import PEFT_PREFIX, PolicyWeight, WeightsVersion
from hybrid_lightning.sharding.ranks import sum_over_ranks
from hybrid_lightning.sharding.weights import Weights

_FULL = f".modules_to_save.{ADAPTER}."


@dataclass(frozen=True)
class _Part:
    """A module with its own weights, adapted or not."""

    name: str  # of the module in the base model
    module: nn.Module  # the adapter's module, where there is one

    @property
    def group(self) -> str:
        """The part of a decoder block that contains the module, or the module itself outside the blocks."""
        names = self.name.split(".")
        number = next((place for place, name in enumerate(names) if name.isdecimal()), None)
        return self.name if number is None else ".".join(names[: number + 2])

    @property
    def source(self) -> nn.Module:
        """The module that provides the weights to send."""
        source: object = self.module
        if isinstance(self.module, ModulesToSaveWrapper):
            source = self.module.modules_to_save[ADAPTER] if self._is_on else self.module.original_module
        elif isinstance(self.module, LoraLayer):
            source = self.module.get_base_layer()
        assert isinstance(source, nn.Module)
        return source

    @property
    def is_trained(self) -> bool:
        """Whether training changes the module."""
        return isinstance(self.module, (ModulesToSaveWrapper, LoraLayer))

    @property
    def _is_on(self) -> bool:
        """Whether its adapter is active; not in the start policy, which is the same model without adapters."""
        return not getattr(self.module, "disable_adapters", False)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and whole shape of each weight."""
        for key, value in _stored(self.source).items():
            yield f"{self.name}.{key}", linear_shape(self.source) if _is_packed(value) else tuple(value.shape)

    def weights(self, merges: bool) -> Iterator[tuple[str, Tensor, LowRankUpdate | None]]:
        """Each weight with the update to merge into it; under FSDP2 all ranks gather the weights here together."""
        for key, value in _stored(self.source).items():
            layer = lora_layers(self.module).get(key) if merges and self._is_on else None
            whole = _whole(dequantize_module_weight(self.source) if _is_packed(value) else value)
            yield f"{self.name}.{key}", whole, None if layer is None else _update(layer, whole)

    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's name and value, perhaps a shard of it, of the factors A and B of its LoRA, if it has an active one."""
        if isinstance(self.module, LoraLayer) and self._is_on:
            for key, factor in (("lora_A", self.module.lora_A), ("lora_B", self.module.lora_B)):
                weight = factor[ADAPTER].weight
                assert isinstance(weight, Tensor)
                yield f"{PEFT_PREFIX}{self.name}.{key}.weight", weight


class CurrentWeights:
    """A policy's weights at the time this object is created (see `PolicyWeights`). With sharded weights all ranks create it.

    `base` distinguishes the base model from others, and `step` is the number of optimizer steps so far. LoRA is merged or
    separate.
    """

    def __init__(self, model: nn.Module, weights: Weights, base: str, step: int, is_sender: bool, merges: bool = True) -> None:
        self._model, self._weights, self.is_sender, self.base, self._merges = model, weights, is_sender, base, merges
        self.version = WeightsVersion(step, self._digest())

    def shapes(self, everything: bool) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight that `stream` yields, in its order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self._chosen(everything):
            for name, shape in part.shapes():
                stored = self._as_stored(part, name, torch.empty(shape, device="meta"))
                shapes |= {key: tuple(value.shape) for key, value in stored.items()}
        return shapes | {name: tuple(factor.shape) for name, factor in self._factors()}

    def stream(self, everything: bool) -> Iterator[PolicyWeight]:
        """All weights, or the weights that training changes with everything that is joined to them, one at a time."""
        with torch.no_grad():
            for part in self._chosen(everything):
                for name, weight, update in part.weights(self._merges):
                    transposed = is_transposed(part.source)
                    if update is not None and is_experts(part.source):  # merged now, so that experts can be split
                        merged = torch.empty(weight.shape, device=weight.device)
                        write_merged(merged, 0, weight, update, transposed)
                        weight, update = merged, None
                    for key, value in self._as_stored(part, name, weight).items():
                        write = partial(write_merged, weight=value, update=update, transposed=transposed)
                        yield PolicyWeight(key, value.shape, write)
            for name, factor in self._factors():
                whole = _whole(factor)
                yield PolicyWeight(name, whole.shape, partial(write_merged, weight=whole, update=None))

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """The part of PEFT's config that vLLM reads, for the separate factors that `stream` yields; None if it yields none."""
        if next(self._factors(), None) is None:
            return None
        config: Any = self._model.peft_config[ADAPTER]  # type: ignore[union-attr, index]
        read = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        targets = sorted(part.name for part in self._parts if isinstance(part.module, LoraLayer))
        return {"peft_type": "LORA", "target_modules": targets} | {name: getattr(config, name) for name in read}

    def _factors(self) -> Iterator[tuple[str, Tensor]]:
        for part in () if self._merges else self._parts:
            yield from part.factors()

    def _as_stored(self, part: _Part, name: str, value: Tensor) -> dict[str, Tensor]:
        """A weight under its names in a checkpoint."""
        return revert_weight_conversion(self._base, {name: value}) if is_experts(part.source) else {name: value}

    @property
    def _base(self) -> Any:
        return self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model

    def _chosen(self, everything: bool) -> list[_Part]:
        if everything or not self._merges:
            return self._parts if everything else []
        trained = {part.group for part in self._parts if part.is_trained}
        return [part for part in self._parts if part.group in trained]

    @cached_property
    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        seen: set[int] = set()  # tied weights come once
        within = ""  # name of the adapted module: its descendants are skipped
        for full_name, module in self._model.named_modules():
            if within and full_name.startswith(within):
                continue
            within = ""
            name = full_name.removeprefix(PEFT_PREFIX)
            if isinstance(module, (ModulesToSaveWrapper, LoraLayer)):
                within = f"{full_name}."
            part = _Part(self._stored_name(name, module), module)
            own = {id(value) for value in _stored(part.source).values()}
            if own - seen:
                parts.append(part)
                seen |= own
        return parts

    def _stored_name(self, name: str, module: nn.Module) -> str:
        """The name of a module in a checkpoint; experts keep their names here, since `_as_stored` splits them."""
        if is_experts(_Part(name, module).source):
            return name
        (stored,) = revert_weight_conversion(self._base, {f"{name}.weight": torch.empty(0)})
        return str(stored).removesuffix(".weight")

    def _digest(self) -> str:
        """A digest of the trained values, computed from the sum of each weight's bits: no slower than reading them."""
        trained = {name: weight for name, weight in self._model.named_parameters() if ".lora_" in name or _FULL in name}
        text = self.base
        if trained and all(part._is_on for part in self._parts):
            sums = torch.stack([_sum_of_bits(parameter) for parameter in trained.values()])
            sums = sum_over_ranks(sums) if self._weights.sharded else sums
            text = f"{text} {[*trained]} {sums.tolist()}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _update(layer: LoraLayer, weight: Tensor) -> LowRankUpdate:
    magnitudes = None
    if ADAPTER in layer.lora_magnitude_vector:
        magnitudes = _whole(layer.lora_magnitude_vector[ADAPTER].weight)  # type: ignore[union-attr, arg-type]
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    update = LowRankUpdate(_whole(a), _whole(b), float(layer.scaling[ADAPTER]), magnitudes)  # type: ignore[arg-type]
    return update.of_experts(len(weight)) if weight.dim() == 3 else update


def _sum_of_bits(parameter: Tensor) -> Tensor:
    local = parameter.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    return local.contiguous().view(torch.int32).sum(dtype=torch.int64)


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The values that a checkpoint holds for a module itself: parameters, and buffers such as a router's correction."""
    values: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    unstored = module._non_persistent_buffers_set
    return values | {name: value for name, value in module.named_buffers(recurse=False) if name not in unstored}


def _is_packed(weight: Tensor) -> bool:
    return hasattr(weight, "quant_state")

"""`FakeModel`: an adapted model of a few layers, whose tensors have a shape but no memory; `LiveTensors` counts their bytes.

Fake tensors pretend to lie on the CPU even where the run will use an accelerator, since a torch without CUDA cannot pretend
that they lie there. Where the engine computes differently on accelerators, `PlannedBackend` makes it do so.
"""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_lightning.adapters.apply import apply_plan
from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.engine import (
    AttentionCalls,
    Engine,
    PackedSequences,
    PlannedBackend,
    UnsupportedAttentionError,
    base_model,
    own_hidden,
    use_fused_layers,
    use_peft_lora,
)
from hybrid_lightning.errors import ModelError
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.model.precision import checkpoint_gradients
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.types import Sequences


class LiveTensors(TorchDispatchMode):
    """Within this context, counts every tensor that an operator makes until it is freed, each storage once.

    That includes backward passes. It does not include scratch memory within an operator, or weights that oneDNN keeps in its own
    order.

    Example:
        >>> with LiveTensors() as live:
        ...     kept = torch.zeros(10) + (torch.zeros(20) + 1).sum()
        >>> live.bytes, live.peak >= 4 * (10 + 20)
        (40, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a storage -> its bytes

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors, also those that were made outside of this context."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if tensor.layout is torch.strided:  # oneDNN's own layout has no storage
                self.count_storage(tensor.untyped_storage())

    def restart_peak(self) -> None:
        """Reset the peak to the bytes that there are now."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)  # the latter is slow, and rarely needed
        self.count(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare torch's guard of each call against compilation, which takes as long as counting; nothing is compiled here."""
        return False

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, which may be known already and have another size now."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            self.bytes += size - self._sizes[key]
        else:
            self.bytes += size
            weakref.finalize(storage, self._free, key)
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


class FakeModel:
    """A model of fake tensors, adapted with LoRA or trained fully, or the base model as it is scored.

    Args:
        settings: Settings of the run.
        layers: Number of layers.
        share: 0 for LoRA on all candidates, 1 for full training of all, None for the base model, whose candidates have gradients.
        device: That the tensors seem to be on. torch has to know it: without CUDA they are on the CPU, and computed with as on
            the device that the settings name.

    Raises:
        ModelError: If the model's attention does not support the engine's packing.
    """

    def __init__(self, settings: RunSettings, layers: int, share: float | None, device: str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        self.mode = FakeTensorMode()
        backend = PlannedBackend(settings.on_cpu)
        model: nn.Module = meta_model(settings.config, settings.dtype, layers)
        candidates = find_candidates(model, settings.target_modules)
        if share is None:
            for module in candidates.values():
                module.weight.requires_grad_(True)
            use_fused_layers(model, backend)
        else:
            # LoRA keeps [tokens, rank] of each module, little beside its input, so that the largest rank does for all with LoRA.
            pattern = {name: rank and settings.largest_rank for name, rank in settings.rank_pattern.items()}
            plan = plan_of_budget(candidates, ModuleBudget(share), settings.lora.with_rank(settings.largest_rank), pattern)
            with torch.device("meta"):
                model = apply_plan(model, plan, settings.keep_start_weights, backend)
        if settings.quantization is not None:
            use_peft_lora(model, backend)
        self.model, self.engine = model, Engine(model, backend)
        try:
            self.engine.assume_packing(torch.bfloat16 if settings.mixed_precision else settings.dtype)
            if settings.gradient_checkpointing:
                checkpoint_gradients(base_model(model), backend)
            self._fake_weights()
            self._record_attention()
        except UnsupportedAttentionError as error:
            raise ModelError(f"the memory of a {settings.config.model_type!r} model cannot be planned: {error}") from error

    def fake(self, tensor: Tensor) -> Tensor:
        """Fake tensor of the same shape and dtype; one that is fake already as it is."""
        if isinstance(tensor, FakeTensor):
            return tensor
        return FakeTensor(self.mode, tensor.detach().to("meta"), self.device)

    def fake_layout(self, packed: PackedSequences) -> None:
        """Replace the tensors of a layout by fake ones, after reading those values in them that decide about shapes."""
        _ = packed.groups
        if packed.segments:
            packed.layout = self._fake_tensors(packed.layout)
            if packed.bands:
                packed.gathered = self._fake_tensors(packed.gathered)
        packed.prompts = self._fake_tensors(packed.prompts)
        packed.bands = [self._fake_tensors(band) for band in packed.bands]
        packed.predictors = self._fake_tensors(packed.predictors)
        packed.ids, packed.positions = self.fake(packed.ids), self.fake(packed.positions)
        packed.last_prompt_token = self.fake(packed.last_prompt_token)

    @contextmanager
    def computing(self) -> Iterator[LiveTensors]:
        """Within this context the model can be called; yields the counter of the tensors that calls make.

        A gradient is freed as soon as it is complete: `plan_memory` adds the gradients itself.
        """
        live = LiveTensors()
        live.count([*self.model.parameters(), *self.model.buffers()])
        live.bytes = live.peak = 0  # count only what computing adds to the weights
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in self.model.parameters() if p.requires_grad]
        try:
            with self.mode, live:
                yield live
        finally:
            for hook in hooks:
                hook.remove()

    def autocast(self) -> torch.autocast:
        """Autocast as under the run's precision, without a cache of cast weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision, cache_enabled=False)

    def _fake_weights(self) -> None:
        made: dict[nn.Parameter, nn.Parameter] = {}  # for weights that two modules share
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        made[parameter] = nn.Parameter(self.fake(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.fake(buffer)

    def _record_attention(self) -> None:
        """Let the engine know what the layers ask of attention, with which it decodes by plain calls of their parts."""
        calls, ids = AttentionCalls(), torch.zeros(1, 2, dtype=torch.long)
        mask = torch.ones_like(ids, dtype=torch.bool)
        packed = self.engine.packed(Sequences(ids, mask, ids[:, :0], mask[:, :0]), completions=False)
        self.fake_layout(packed)
        with self.computing(), torch.no_grad(), self.autocast(), self.engine.backend.in_pass():
            own_hidden(self.model, packed.ids, packed.positions, packed, calls)
        self.engine.assume_calls(calls)

    def _fake_tensors(self, value: Any) -> Any:
        """A copy of a dataclass (or tensor) with fake tensors, also in nested dataclasses."""
        if isinstance(value, Tensor):
            return self.fake(value)
        if not dataclasses.is_dataclass(value):
            return value
        entries = {entry.name: self._fake_tensors(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **entries)  # type: ignore[type-var]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

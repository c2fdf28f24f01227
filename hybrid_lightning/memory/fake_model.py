"""`LiveTensors`: how many bytes of tensors there are, now and at most.

An adapted model of a few layers whose tensors have shapes but no memory, and which computes on them as on a CPU.

Fake tensors pretend to lie on the CPU even where the run will use an accelerator, since a torch without CUDA cannot pretend the
other. Where the engine itself goes another way on accelerators, its `PlannedBackend` says so.
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
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.engine import (
    Engine,
    PackedSequences,
    PlannedBackend,
    UnsupportedAttentionError,
    base_model,
    use_fused_layers,
    use_peft_lora,
)
from hybrid_lightning.errors import ModelError
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import meta_model, plan_of_budget
from hybrid_lightning.policy.modes import checkpoint_gradients


class LiveTensors(TorchDispatchMode):
    """Within this context every tensor that an operator makes is counted until it is freed, each storage once.

    Backward passes are seen too. Scratch memory within an operator is not, nor are weights that oneDNN keeps in its own order.

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
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def restart_peak(self) -> None:
        """Let the peak be what there is now."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # as of nearly every operator
            self._count(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch else guards each call against compilers, which takes as long as counting; nothing is compiled in here."""
        return False

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.layout is torch.strided:  # and not oneDNN's own, which has no storage
            self.count_storage(tensor.untyped_storage())

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that was made before, or has another size now."""
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
    """A model of `layers` layers, adapted by LoRA or trained fully, or (with neither) as it is scored.

    Args:
        settings: Of the run.
        layers: How many.
        share: 0 for LoRA on all candidates, 1 for all of them trained fully, None for the base model, whose candidates have
            gradients.

    Raises:
        ModelError: If the model's attention cannot be told how to attend.
    """

    def __init__(self, settings: RunSettings, layers: int, share: float | None) -> None:
        self.settings = settings
        self.mode = FakeTensorMode()
        backend = PlannedBackend(settings.on_cpu)
        model = meta_model(settings.config, settings.dtype, layers)
        candidates = find_candidates(model, settings.target_modules)
        if share is None:
            for module in candidates.values():
                module.weight.requires_grad_(True)
            use_fused_layers(model, backend)
        else:
            plan = plan_of_budget(candidates, ModuleBudget(share), settings.lora)
            with torch.device("meta"):
                model = apply_plan(model, plan, settings.keep_start_weights, settings.trained_dtype, backend)
        if settings.quantization is not None:
            use_peft_lora(model, backend)
        self.model, self.engine = model, Engine(model, backend)
        try:
            self.engine.assume_packing()
        except UnsupportedAttentionError as error:
            raise ModelError(f"the memory of a {settings.config.model_type!r} model cannot be planned: {error}") from error
        if settings.gradient_checkpointing:
            checkpoint_gradients(base_model(model), backend)
        self._fake_weights()

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and dtype."""
        result: Tensor = FakeTensor(self.mode, tensor.detach().to("meta"), torch.device("cpu"))
        return result

    def fake_layout(self, packed: PackedSequences) -> None:
        """Replace the tensors of a layout; what of them decides about shapes has been read when it was made, or is here."""
        _ = packed.groups
        packed.prompts = self._fake_tensors(packed.prompts)
        packed.bands = [self._fake_tensors(band) for band in packed.bands]
        packed.predictors = self._fake_tensors(packed.predictors)
        packed.ids, packed.positions = self.fake(packed.ids), self.fake(packed.positions)
        packed.last_prompt_token = self.fake(packed.last_prompt_token)

    @contextmanager
    def computing(self) -> Iterator[LiveTensors]:
        """Within this context the model can be called, under the run's precision; yields the count of what that makes.

        A gradient is freed as soon as it is complete: `plan_memory` counts the gradients by itself.
        """
        live = LiveTensors()
        live.count([*self.model.parameters(), *self.model.buffers()])
        live.bytes = live.peak = 0  # what computing adds to them
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in self.model.parameters() if p.requires_grad]
        try:
            with self.mode, live:
                yield live
        finally:
            for hook in hooks:
                hook.remove()

    def autocast(self) -> torch.autocast:
        """As the Trainer's precision, by which no cast weight is kept for its next use."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.mixed_precision, cache_enabled=False)

    def _fake_weights(self) -> None:
        made: dict[nn.Parameter, nn.Parameter] = {}  # two modules may share a weight
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        made[parameter] = nn.Parameter(self.fake(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.fake(buffer)

    def _fake_tensors(self, value: Any) -> Any:
        """The same with a fake for each tensor in it, dataclasses within dataclasses included."""
        if isinstance(value, Tensor):
            return self.fake(value)
        if not dataclasses.is_dataclass(value):
            return value
        entries = {entry.name: self._fake_tensors(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **entries)  # type: ignore[type-var]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

"""`FakeModel`: an adapted model of a few layers. Its tensors have a shape and a device but no memory.

With this imported, what torch would compile for a GPU is computed as it is: bodies of layers by their operations, a `OneKernel`
as one operator, `hybrid_lightning::<name>`.
"""

import dataclasses
from copy import deepcopy
from functools import cache

import torch
import torch.nn.functional as F
from fake_gpu import multiplies_to_floats
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hybrid_lightning.adapters.apply import apply_plan
from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.engine import AttentionCalls, Backend, Engine, OneKernel, base_model, own_hidden, use_fused_layers
from hybrid_lightning.engine.attention_hook import use_packing
from hybrid_lightning.engine.decoder_layers import _Body
from hybrid_lightning.engine.engine import _Trial
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.types import Sequences

_OPERATORS = torch.library.Library("hybrid_lightning", "DEF")
_EXACT = multiplies_to_floats()  # now: a plain tensor is wanted


@cache
def operator_of(kernel):
    """The operator that stands for a kernel."""
    _OPERATORS.define(kernel._name + torch.library.infer_schema(kernel.plain, mutates_args=()))
    torch.library.register_fake(f"hybrid_lightning::{kernel._name}", kernel.plain, lib=_OPERATORS)
    return getattr(torch.ops.hybrid_lightning, kernel._name).default


def one_kernel(kernel, *given):
    return operator_of(kernel)(*[part.contiguous() if isinstance(part, torch.Tensor) else part for part in given])


OneKernel.__call__ = one_kernel
_Body.__call__ = lambda body, *rows: body.function(*rows, body.layer)


class FakeBackend(Backend):
    """The backend of a GPU with kernels that attend by segments."""

    def why_no_segments(self, device, dtype):
        return ""

    def float_logits(self, hidden, weight):
        return super().float_logits(hidden, weight) if _EXACT else F.linear(hidden, weight).float()


def _first_layers(config, layers):
    """A config with fewer layers."""
    config = deepcopy(config)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    return config


class FakeModel:
    """The model of a config on an accelerator, adapted by `share`; None: as for scoring."""

    def __init__(self, config, layers, share, lora, device, dtype=torch.bfloat16):
        self.device, self.mode = torch.device(device), FakeTensorMode()
        backend, model = FakeBackend(), meta_model(_first_layers(config, layers), dtype)
        candidates = find_candidates(model)
        if share is None:
            for module in candidates.values():
                module.weight.requires_grad_(True)
            use_fused_layers(model, backend)
        else:
            self.plan = plan_of_budget(candidates, ModuleBudget(share), lora)
            with torch.device("meta"):
                model = apply_plan(model, self.plan, True, backend)
        self.model, self.engine = model, Engine(model, backend)
        use_packing(base_model(model))
        self._fake_weights()
        self._record_attention()

    def fake(self, tensor):
        """Fake tensor of the same shape and dtype; one that is fake already as it is."""
        return tensor if isinstance(tensor, FakeTensor) else FakeTensor(self.mode, tensor.detach().to("meta"), self.device)

    def _fake_weights(self):
        made = {}  # for weights that two modules share
        for module in self.model.modules():
            for name, part in module._parameters.items():
                if part is not None:
                    if part not in made:
                        made[part] = nn.Parameter(self.fake(part), requires_grad=part.requires_grad)
                    module._parameters[name] = made[part]
            for name, part in module._buffers.items():
                if part is not None:
                    module._buffers[name] = self.fake(part)

    def _record_attention(self):
        """Let the engine know what the layers ask of attention, with which it decodes by plain calls of their parts."""
        calls, ids = AttentionCalls(), torch.zeros(1, 2, dtype=torch.long)
        self.engine._trial = _Trial(calls)
        self.engine._fast.calls_parts = self.engine._fast._tried = True
        mask = torch.ones_like(ids, dtype=torch.bool)
        packed = self.engine.packed(Sequences(ids, mask, ids[:, :0], mask[:, :0]), completions=False)
        packed.layout = self._fake_tensors(packed.layout)
        packed.ids, packed.positions = self.fake(packed.ids), self.fake(packed.positions)
        half = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        with self.mode, half, torch.no_grad(), self.engine.backend.in_pass():
            own_hidden(self.model, packed.ids, packed.positions, packed, attention_calls=calls)

    def _fake_tensors(self, value):
        """A copy of a dataclass (or tensor) with fake tensors, also in nested dataclasses."""
        if isinstance(value, torch.Tensor):
            return self.fake(value)
        if not dataclasses.is_dataclass(value):
            return value
        return dataclasses.replace(
            value, **{entry.name: self._fake_tensors(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        )

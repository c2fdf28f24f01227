"""`FakeModel`: an adapted model of a few layers. Its tensors have a shape and a device but no memory.

What torch would compile for a GPU is computed as it is: bodies of layers by their operations, a `OneKernel` as one operator,
`hybrid_lightning::<name>`.
"""

from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from unittest import mock

import device
import torch
import torch.nn.functional as F
from fake_gpu import multiplies_to_floats
from known import COMPILED, Counted, tell
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hybrid_lightning.adapters.apply import apply_plan
from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.runner import Backend, ModelRunner, compiling, decoder_layers, use_fused_layers

_OPERATORS = torch.library.Library("hybrid_lightning", "DEF")
_EXACT = multiplies_to_floats()  # now: a plain tensor is wanted
_FEW = 1024  # rows of a decoding step


@cache
def operator_of(name, plain):
    """The operator that stands for a compiled function with this signature."""
    _OPERATORS.define(name + torch.library.infer_schema(plain, mutates_args=()))
    torch.library.register_fake(f"hybrid_lightning::{name}", plain, lib=_OPERATORS)
    operator = getattr(torch.ops.hybrid_lightning, name).default
    COMPILED[operator] = plain
    return operator


def compiled(function, arguments, axes, kind=None):
    """In place of torch's compiler: code that computes a function as one operator, or a layer's body between its products.

    Of the prompts' pass, which is large, the memory counts, and bodies are computed as they are.
    """
    leaves, tree = tree_flatten(tuple(arguments))  # not kept: they are examples
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    rest = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    names = {name for some in axes for name in some.values() if isinstance(name, str)}

    def run(*given):
        assert len(given) == len(names) + len(places)
        whole = rest | dict(zip(places, given[len(names) :], strict=True))
        arguments = tree_unflatten([whole[place] for place in range(len(whole))], tree)
        if "attention" not in function.__name__:
            return operator_of(function.__name__.lstrip("_"), function)(*arguments)
        counters = device.listeners[-1:] if given[0] < _FEW else ()
        return counters[0].compiled(lambda: function(*arguments)) if counters else function(*arguments)

    return compiling.Code(run, lambda *sizes: min(sizes) > 1, None)


def without_compiler():
    """A context in which torch compiles nothing."""
    stack = ExitStack()
    for module in (compiling, decoder_layers):
        stack.enter_context(mock.patch.object(module, "compiled", compiled))
    return stack


class FakeBackend(Backend):
    """The backend of a GPU, whose logits older torch has by other kernels."""

    def float_logits(self, hidden, weight):
        return super().float_logits(hidden, weight) if _EXACT else F.linear(hidden, weight).float()


class FakeModel:
    """A model on an accelerator, of another one's shapes; with its values if it has some. Its passes are tried as on a GPU."""

    def __init__(self, model, backend):
        self.device, self.mode = torch.device("cuda:0"), FakeTensorMode()
        self.model, self.runner = model, ModelRunner(model, backend)
        self._exact = next(model.parameters()).device.type != "meta"
        self._fake_weights()
        half = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        with without_compiler(), self.counted(), half, torch.no_grad(), self.runner.sampling(torch.bfloat16):
            self.passes = self.runner.passes()

    def counted(self):
        return Counted(self, self._exact)

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
                        self._tell(made[part], part)
                    module._parameters[name] = made[part]
            for name, part in module._buffers.items():
                if part is not None:
                    module._buffers[name] = self.fake(part)
                    self._tell(module._buffers[name], part)

    def _tell(self, fake, part):
        if self._exact:
            tell(fake, part.detach().double())


def adapted(config, layers, share, lora, dtype=torch.bfloat16):
    """The first layers of a model without values, adapted by `share`; None: as for scoring."""
    config = deepcopy(config)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    backend, model = FakeBackend(), meta_model(config, dtype)
    candidates = find_candidates(model)
    if share is None:
        for module in candidates.values():
            module.weight.requires_grad_(True)
        use_fused_layers(model, backend)
        return FakeModel(model, backend)
    plan = plan_of_budget(candidates, ModuleBudget(share), lora)
    with torch.device("meta"):
        fake = FakeModel(apply_plan(model, plan, True, backend), backend)
    fake.plan = plan
    return fake

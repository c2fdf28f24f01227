"""Prepacked weights: faster products of LoRA layers while weights do not change. Decoding makes thousands of small products.

Layers with the same input, such as the projections to queries, keys and values, become one product instead of two or three. The
fewer the rows, the more this saves: 8 to 32 rows of SmolLM2-135M took 0.6 to 0.9 of the time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.fused_layers import hooks_of
from hybrid_lightning.runner.fused_lora import FusedLora, made_like, weight_of


class ProductFactors(NamedTuple):
    """The factors of y = x W' + b + (x A') B', or of y = x W' + b where A and B are None."""

    weight: Tensor  # W [m, n]
    bias: Tensor | None  # b [m]
    lora_a: Tensor | None = None  # A [r, n]
    lora_b: Tensor | None = None  # B [m, r], scaled already


def _multiply(x: Tensor, factors: ProductFactors) -> Tensor:
    """[N, n] -> [N, m] in the dtype of W or autocast's, without a gradient."""
    x = x.to(factors.weight.dtype)
    result = F.linear(x, factors.weight, factors.bias)
    if factors.lora_a is None or factors.lora_b is None:
        return result
    return result.addmm_(F.linear(x, factors.lora_a.to(x.dtype)), factors.lora_b.T.to(result.dtype))


def product_factors(layer: nn.Module) -> ProductFactors | None:
    """The factors of a linear layer, fully trained or with plain LoRA, while weights do not change and its adapter is enabled.

    None for other layers, for a layer with hooks, and for LoRA on a CPU, where products use copies of the weights.
    """
    if isinstance(layer, FusedLora):
        products = _owner(layer)
        return None if products is None else products.factors
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if type(layer) is not nn.Linear or hooks_of(layer):
        return None
    return ProductFactors(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def products_together(layers: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function from the common input [..., n] of these layers to each layer's output [..., m], while weights do not change."""
    owners = [_owner(layer) for layer in layers]
    products = next((owner for owner in owners if owner is not None and len(owner.sizes) > 1), None)
    joined = [products is not None and owner is products for owner in owners]
    first = layers[joined.index(True)] if any(joined) else None

    def outputs(x: Tensor) -> Sequence[Tensor]:
        if products is None or not isinstance(first, FusedLora) or first.disable_adapters:
            return [layer(x) for layer in layers]
        results = products.together(x)
        if all(joined):
            return results
        parts = iter(results)
        return [next(parts) if together else layer(x) for layer, together in zip(layers, joined, strict=True)]

    return outputs


def _owner(layer: nn.Module) -> "_Products | None":
    prepacked = layer.prepacked if isinstance(layer, FusedLora) else None
    return prepacked.func if isinstance(prepacked, partial) and isinstance(prepacked.func, _Products) else None


@contextmanager
def prepacked_weights(
    model: nn.Module, backend: Backend, dtype: torch.dtype | None = None, together: Iterable[Sequence[nn.Module]] = ()
) -> Iterator[None]:
    """Prepare weights for products once. Within this context they must not change.

    The weights themselves are kept. On CPUs each base weight is copied into the order in which products read it. On other devices
    a weight is copied only if its dtype differs from the products' dtype; `dtype=None` takes the dtype of each base weight. The
    weight of a fully trained module with another dtype is copied on all devices: autocast would round it at every token.

    Layers in one set of `together` have the same input. Call them with `products_together`, since calling one of them would
    compute the products of all.
    """
    sets = _layer_sets(model, backend, together)
    for layers in sets:
        products = _Products(layers, weight_of(layers[0].base_layer).dtype if dtype is None else dtype, backend)
        for number, layer in enumerate(layers):
            layer.prepacked = partial(products, number)
    trained = _trained_fully(model, dtype)
    try:
        for saved, name, own in trained:
            saved[name] = _rounded(own, dtype)
        yield
    finally:
        for saved, name, own in trained:
            saved[name] = own
        for layers in sets:
            for layer in layers:
                layer.prepacked = None


def _trained_fully(model: nn.Module, dtype: torch.dtype | None) -> list[tuple[nn.ModuleDict, str, nn.Module]]:
    """Fully trained linear layers with another dtype than the products, and where each is stored; none if `dtype` is None."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    found = [(one.modules_to_save, name, layer) for one in wrappers for name, layer in one.modules_to_save.items()]
    linear = [entry for entry in found if type(entry[2]) is nn.Linear]
    return [] if dtype is None else [entry for entry in linear if weight_of(entry[2]).dtype != dtype]


def _rounded(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    copy = made_like(layer, nn.Linear)
    copy._parameters = {
        name: None if part is None else nn.Parameter(part.detach().to(dtype), requires_grad=False)
        for name, part in layer._parameters.items()
    }
    return copy


def why_not_prepacked(model: nn.Module, backend: Backend, dtype: torch.dtype) -> str:
    """Why sampling prepacks no weight for products of this dtype, worded for the user; empty where it does."""
    layers = [module for module in model.modules() if isinstance(module, FusedLora)]
    if not layers:
        return "no layer has LoRA"
    if all(layer.plain_adapter_in_eval() is None for layer in layers):
        return "its LoRA is not plain, for example DoRA, or on quantized weights"
    return backend.why_no_copies(next(model.parameters()).device, dtype)


def _layer_sets(model: nn.Module, backend: Backend, together: Iterable[Sequence[nn.Module]]) -> list[list[FusedLora]]:
    """All layers with plain LoRA, in sets that are multiplied together."""
    plain = [module for module in model.modules() if isinstance(module, FusedLora) and module.plain_adapter() is not None]
    sets = []
    for layers in together:
        plain_ones = [layer for layer in layers if isinstance(layer, FusedLora) and layer.plain_adapter() is not None]
        if len(plain_ones) > 1 and backend.copies_pay(weight_of(plain_ones[0].base_layer).device):
            sets.append(plain_ones)
    joined = {layer for layers in sets for layer in layers}
    return [*sets, *([layer] for layer in plain if layer not in joined)]


class _Products:
    """The products of a set of layers with the same input.

    In float32 on a CPU the base weight is copied anyway, so LoRA is merged into the copy: the results differ by 1e-6. In bfloat16
    LoRA is not merged. On SmolLM2-135M merging decoded 10% faster, but it rounds the merged weight: log-probabilities differed
    from training's by 0.064 on average instead of 0.022 (when logits were still rounded to bfloat16).

    On an accelerator the base weights are not copied: the copy would take as much memory as the model.
    """

    def __init__(self, layers: Sequence[FusedLora], dtype: torch.dtype, backend: Backend) -> None:
        self.dtype = dtype
        self.factors: ProductFactors | None = None
        self.with_low: Callable[[Tensor], Tensor] | None = None
        self.bias = _joined_bias(layers, dtype)
        self.sizes = [weight_of(layer.base_layer).shape[0] for layer in layers]
        # [m, n], [r, n] and s B: [m, r]; m and r of all layers together.
        base = [weight_of(layer.base_layer).detach().to(dtype) for layer in layers]
        downs = [weight_of(layer.lora_A[_adapter(layer)]).detach() for layer in layers]
        ups = [_scaled_up(layer) for layer in layers]
        if not backend.copies_pay(base[0].device):
            self.factors = ProductFactors(base[0], self.bias, downs[0].to(dtype), ups[0].to(dtype))
        elif dtype == torch.float32:
            pairs = zip(base, ups, downs, strict=True)
            self.product = backend.prepacked_product(
                torch.cat([torch.addmm(part, lora_b, lora_a) for part, lora_b, lora_a in pairs])
            )
        else:
            # [x, x A'] [W, s B]' is one product instead of two and a sum, and is rounded only once.
            self.with_low = _with_low_rank(torch.cat(downs).to(dtype), backend)
            self.product = backend.prepacked_product(torch.cat([torch.cat(base), torch.block_diag(*ups).to(dtype)], dim=1))

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """The product of one of the layers with x: [..., n] -> [..., m]."""
        return self.together(x)[number]

    def together(self, x: Tensor) -> Sequence[Tensor]:
        """The products of all layers with x: [..., n] -> [..., m] each."""
        result = self._all(x.reshape(-1, x.shape[-1]).to(self.dtype)).view(*x.shape[:-1], -1)
        return (result,) if len(self.sizes) == 1 else torch.split_with_sizes(result, self.sizes, -1)

    def _all(self, rows: Tensor) -> Tensor:
        if self.factors is not None:
            return _multiply(rows, self.factors)
        result = self.product(rows if self.with_low is None else self.with_low(rows))
        if self.bias is not None:
            result += self.bias
        return result


def _with_low_rank(lora_a: Tensor, backend: Backend) -> Callable[[Tensor], Tensor]:
    """The function from x [N, n] to [x, x A'] [N, n + r]."""
    if backend.usable(lora_a):
        factors = lora_a.float()
        return lambda rows: kernels.with_low_rank(rows, factors)
    product = backend.prepacked_product(lora_a)
    return lambda rows: torch.cat([rows, product(rows)], dim=1)


def _adapter(layer: FusedLora) -> str:
    name = layer.plain_adapter()
    assert name is not None
    return name


def _scaled_up(layer: FusedLora) -> Tensor:
    adapter = _adapter(layer)
    return weight_of(layer.lora_B[adapter]).detach() * layer.scaling[adapter]


def _joined_bias(layers: Sequence[FusedLora], dtype: torch.dtype) -> Tensor | None:
    bases = [layer.base_layer for layer in layers]
    if all(base.bias is None for base in bases):
        return None
    parts = [weight_of(base).new_zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases]  # type: ignore[arg-type, union-attr, operator]
    return torch.cat(parts).to(dtype)

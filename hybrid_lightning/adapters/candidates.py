"""Which modules of a language model can be adapted: the linear modules inside its decoder blocks.

Everything outside a block (embeddings, `lm_head`) and every weight that two modules share (tied embeddings) is left
alone: a fully trained copy of a shared weight would untie it in silence.

Experts that a mixture keeps as one three-dimensional parameter (transformers 5 does so for most of them) are no
linear modules, so they are no candidates and stay frozen.
"""

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.errors import ModelError

LinearLike = nn.Linear | Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Shape of a linear module as (outputs, inputs), whatever the layout of its weight.

    GPT-2's `Conv1D` stores its weight transposed, and a 4-bit linear module packs it.
    """
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return outputs, inputs
    assert isinstance(module, nn.Linear), f"{type(module).__name__} is not a linear module"
    return module.out_features, module.in_features


def find_candidates(
    model: nn.Module, target_modules: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, LinearLike]:
    """Find the linear modules that can be fully trained or adapted.

    Args:
        model: a causal language model without an adapter.
        target_modules: ends of module names to choose from, each matching at a dot, such as `["q_proj",
            "mlp.up_proj"]`; None takes all candidates.
        exclude: parts of module names to leave out, such as `["layers.0", "down_proj"]`; each is matched from dot to
            dot, anywhere in the name.

    Returns:
        Full dotted name -> module, in the model's order.

    Raises:
        ModelError: if nothing is left, a pattern matches nothing, or the model already has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("the model already carries a PEFT adapter: find the candidates on the base model instead.")
    candidates = _linear_modules_in_blocks(model)
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no linear module inside numbered decoder blocks: use a decoder-only "
            "transformer whose blocks hold nn.Linear (or transformers' Conv1D) modules."
        )
    chosen = _matching(candidates, target_modules, "target_modules") if target_modules is not None else set(candidates)
    if exclude:
        chosen -= _matching(candidates, exclude, "exclude")
    if not chosen:
        raise ModelError(f"target_modules={target_modules} and exclude={list(exclude)} leave no module to adapt: exclude fewer.")
    return {name: module for name, module in candidates.items() if name in chosen}


def _linear_modules_in_blocks(model: nn.Module) -> dict[str, LinearLike]:
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LinearLike) and name.startswith(blocks) and owners[id(module.weight)] == 1
    }


def _matching(candidates: dict[str, LinearLike], patterns: Sequence[str], argument: str) -> set[str]:
    if isinstance(patterns, str) or not patterns:
        raise ModelError(f"{argument}={patterns!r}: give a list of module names such as ['q_proj', 'v_proj'].")
    found: set[str] = set()
    for pattern in patterns:
        if argument == "exclude":
            names = {name for name in candidates if f".{pattern}." in f".{name}."}
        else:
            names = {name for name in candidates if f".{name}".endswith(f".{pattern}")}
        if not names:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise ModelError(
                f"{argument}: {pattern!r} matches no candidate module: the model has modules named {', '.join(kinds)} "
                f"(in full, for example, {next(iter(candidates))})."
            )
        found |= names
    return found

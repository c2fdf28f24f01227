"""Find the modules of a language model that can be adapted (linear modules, experts and routers in its blocks), and their ranks.

Modules outside the blocks (embeddings, `lm_head`) are not candidates. Neither is a module that shares its weight with another one
(tied embeddings): a fully trained copy of a shared weight would silently untie it.

Most mixture-of-experts models keep the matrices of a layer's experts in three-dimensional parameters of one module. Such a module
is one candidate, and only if it is named, since experts hold most of a model's weights. The same applies to a router, which has
its own weight and returns more than a product.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.gradients import matrices_of
from hybrid_lightning.errors import ConfigError, ModelError

LinearLike = nn.Linear | Conv1D
# (outputs, inputs) of a linear module; for experts and routers, name of each parameter with matrices -> its shape as stored.
Shape = tuple[int, int] | Mapping[str, tuple[int, ...]]
Group = Literal["attention", "mlp"]
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "expert")
_MLP_MODULES = frozenset({"fc1", "fc2"})  # in families without a module for the whole MLP, such as OPT
# The last product of a state space layer (Mamba). Fused kernels read its weight directly: LoRA on it would train nothing.
_READ_BY_KERNELS = (".mamba.out_proj", ".mixer.out_proj")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Shape of a linear module as (outputs, inputs), also of a transposed `Conv1D` of GPT-2, and of packed 4-bit weights."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return outputs, inputs
    assert isinstance(module, nn.Linear), f"{type(module).__name__} is not a linear module"
    return module.out_features, module.in_features


def is_transposed(module: nn.Module) -> bool:
    """Whether a candidate's matrices are [inputs, outputs], as PEFT reads them."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def candidate_shape(module: nn.Module) -> Shape:
    """Shape of a candidate; empty for any other module."""
    if is_linear(module):
        return linear_shape(module)
    own = matrices_of(module) if is_experts(module) or is_router(module) else {}
    return {name: tuple(weight.shape) for name, weight in own.items()}


def find_candidates(
    model: nn.Module, target_modules: Sequence[str] | None = None, named: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Find the modules that can be fully trained or adapted with LoRA: linear modules, and explicitly named experts and routers.

    Args:
        model: Causal language model without an adapter.
        target_modules: Suffixes of the module names to take, whole dotted parts such as `["q_proj", "mlp.up_proj"]`; None takes
            all linear modules.
        named: Suffixes of names, such as the keys of a rank pattern. Experts and routers that match one of them are candidates
            in addition to all linear modules.

    Returns:
        Full dotted name -> module, in the model's order.

    Raises:
        ModelError: If there are no candidates, a suffix matches nothing, or the model already has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("the model already has a PEFT adapter; find the candidates in the base model")
    found = _modules_in_blocks(model)
    candidates = {name: module for name, module in found.items() if is_linear(module)}
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no linear module inside numbered decoder blocks; use a decoder-only "
            "transformer with nn.Linear (or transformers' Conv1D) modules in its blocks"
        )
    ends = [*named] if target_modules is None else target_modules
    if isinstance(target_modules, str) or not (target_modules or target_modules is None):
        raise ModelError(f"target_modules={target_modules!r}; give a list of module names such as ['q_proj', 'v_proj']")
    for end in target_modules or ():
        if not any(_ends(end, name) for name in found):
            raise ModelError(f"target_modules: {end!r} matches no candidate module; give one of {_kinds(found)}")
    chosen = {name for name in found if any(_ends(end, name) for end in ends)}
    chosen |= set(candidates) if target_modules is None else set()
    return {name: module for name, module in found.items() if name in chosen}


def share_of_experts(model: nn.Module, trained: Iterable[str] = ()) -> float:
    """Share of a model's weights, adapted or not, in three-dimensional parameters of experts that are not `trained`."""
    names, blocks = tuple(f".{name}." for name in trained), tuple(f"{name}." for name in _block_lists(model))
    of_experts = sum(
        parameter.numel()
        for name, module in model.named_modules()
        if name.startswith(blocks) and is_experts(module) and not any(part in f".{name}." for part in names)
        for parameter in matrices_of(module).values()
    )
    return of_experts / max(1, sum(parameter.numel() for parameter in model.parameters()))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of experts in its own three-dimensional parameters."""
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Conv1d) and any(parameter.dim() == 3 for parameter in own)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear and computes nothing else. (Llama 4's router is a kind of `nn.Linear`.)"""
    return isinstance(module, LinearLike) and not _is_of_a_model(module)


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts with its own matrix."""
    own = dict(module.named_parameters(recurse=False))
    return _is_of_a_model(module) and "weight" in own and own["weight"].dim() == 2


def _is_of_a_model(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _modules_in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    blocks = tuple(f"{name}." for name in _block_lists(model))
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(blocks)
        and (is_linear(module) or is_experts(module) or is_router(module))
        and all(owners[id(matrix)] == 1 for matrix in matrices_of(module).values())
    }


def _block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of blocks; in a vision-language model, only the lists of its text part."""
    names = {module: name for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    is_wrapper = hasattr(config, "get_text_config") and config.get_text_config() is not config  # type: ignore[union-attr]
    part = names[model.get_decoder()] if is_wrapper else ""  # type: ignore[operator]
    return [name for module, name in names.items() if isinstance(module, nn.ModuleList) and f"{name}.".startswith(part)]


def _ends(end: str, name: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _kinds(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))} (in full, for example, {names[0]})"


# ---- ranks that differ between modules: by a pattern of names, such as `{mlp: 8, attention: 1}`


def module_group(name: str) -> Group | None:
    """The group of a module by its full dotted name: attention or MLP of its decoder block; None for neither."""
    parts = name.lower().split(".")
    if any(word in part for part in parts for word in _ATTENTION):
        return "attention"
    if parts[-1] in _MLP_MODULES or any(word in part for part in parts for word in _MLP):
        return "mlp"
    return None


def without_lora(names: Iterable[str]) -> list[str]:
    """The modules that cannot have LoRA, by their full dotted names; they can be trained fully."""
    return [name for name in names if name.endswith(_READ_BY_KERNELS)]


def check_pattern(pattern: Mapping[str, int]) -> None:
    """Raise ConfigError if a rank in a pattern is not a whole number, or is negative."""
    for key, rank in pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(
                f"rank_pattern: {key}={rank!r} is not a rank; give a whole number of at least 1, or 0 for modules without LoRA"
            )


def ranks_by_pattern(names: Iterable[str], pattern: Mapping[str, int], rank: int) -> dict[str, int]:
    """The rank of each candidate by its full dotted name. 0 means no LoRA; modules that no key matches get `rank`.

    Modules that cannot have LoRA (`without_lora`) get 0.

    A key is `attention`, `mlp`, or the end of module names, in whole dotted parts such as `q_proj` or `0.mlp.down_proj`. If
    several keys match a module, the longest name decides, and a name comes before the two groups.

    Raises:
        ConfigError: If a rank is impossible.
        ModelError: If a key matches no module.
    """
    check_pattern(pattern)
    names, groups = list(names), get_args(Group)
    keys = {
        name: [key for key in pattern if (module_group(name) == key if key in groups else _ends(key, name))] for name in names
    }
    unused = set(pattern).difference(*keys.values())
    if unused:
        there = ", ".join(sorted({group for name in names if (group := module_group(name)) is not None})) or "none"
        raise ModelError(
            f"rank_pattern: {next(key for key in pattern if key in unused)!r} matches no candidate module; give the end of a "
            f"name, such as {_kinds(names)}, or a group (it has {there})"
        )

    def parts(key: str) -> int:
        return 0 if key in groups else len(key.split("."))

    ranks = {name: pattern[max(found, key=parts)] if found else rank for name, found in keys.items()}
    return ranks | dict.fromkeys(without_lora(names), 0)

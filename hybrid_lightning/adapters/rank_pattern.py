"""LoRA ranks that differ between modules: by a pattern of names, such as `{mlp: 8, attention: 1}`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from hybrid_lightning.errors import ConfigError, ModelError

Group = Literal["attention", "mlp"]
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "expert")
_MLP_MODULES = frozenset({"fc1", "fc2"})  # of families that have no module for the whole MLP, such as OPT


def module_group(name: str) -> Group | None:
    """Whether a module belongs to the attention of its decoder block or to the MLP, by its name; None if to neither.

    Args:
        name: Full dotted name.
    """
    parts = name.lower().split(".")
    if any(word in part for part in parts for word in _ATTENTION):
        return "attention"
    if parts[-1] in _MLP_MODULES or any(word in part for part in parts for word in _MLP):
        return "mlp"
    return None


def check_pattern(pattern: Mapping[str, int]) -> None:
    """Check the ranks of a pattern.

    Raises:
        ConfigError: If one is no whole number, or negative.
    """
    for key, rank in pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(
                f"rank_pattern: {key}={rank!r} must be a whole number: a rank of at least 1, or 0 for modules without LoRA"
            )


def ranks_by_pattern(names: Iterable[str], pattern: Mapping[str, int], rank: int) -> dict[str, int]:
    """The rank of each module.

    A key is `attention`, `mlp`, or the end of module names, in whole dotted parts such as `q_proj` or `0.mlp.down_proj`. Of the
    keys that match a module the longest name decides, and any name before the two groups.

    Args:
        names: Full dotted names of the candidates.
        pattern: Key -> rank; 0 is no LoRA.
        rank: Of modules that no key matches.

    Returns:
        Full dotted name -> rank.

    Raises:
        ConfigError: If a rank is impossible.
        ModelError: If a key matches no module.
    """
    check_pattern(pattern)
    names = list(names)
    keys = {name: [key for key in pattern if _matches(key, name)] for name in names}
    unused = set(pattern).difference(*keys.values())
    if unused:
        raise ModelError(_no_match(next(key for key in pattern if key in unused), names))
    return {name: pattern[max(found, key=_parts)] if found else rank for name, found in keys.items()}


def _matches(key: str, name: str) -> bool:
    if key in ("attention", "mlp"):
        return module_group(name) == key
    return f".{name}".endswith(f".{key}")


def _parts(key: str) -> int:
    return 0 if key in ("attention", "mlp") else len(key.split("."))


def _no_match(key: str, names: Sequence[str]) -> str:
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    groups = ", ".join(sorted({group for name in names if (group := module_group(name)) is not None})) or "none"
    return (
        f"rank_pattern: {key!r} matches no candidate module; give the end of a name (the model has {kinds}; in full, for "
        f"example, {names[0]}) or a group (it has {groups})"
    )

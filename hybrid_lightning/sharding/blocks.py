"""The decoder blocks of a language model, which are its units of sharding."""

from torch import nn

from hybrid_lightning.errors import ModelError


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules in the outermost numbered lists: what is gathered, computed and given back together.

    Args:
        model: A language model, adapted or not.

    Raises:
        ModelError: If it has none.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not within:
            blocks |= {f"{name}.{number}": block for number, block in enumerate(module)}
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no numbered decoder blocks, so it cannot be sharded; use DDP instead")
    return list(blocks.values())

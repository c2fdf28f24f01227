"""What each of N devices holds of weights, gradients and optimizer state, by Trainer strategy."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from hybrid_lightning.memory.sizes import ModelSizes

# Moments of a run: the base model samples, and makes the passes that score modules; completions are sampled, with the gradients
# of the previous step; a rollout engine with weights of its own samples; and of a training pass its beginning, before it has
# computed anything, the end of its forward pass, with all gradients of earlier passes, and its backward pass.
Moment = Literal["calibrating", "scoring", "generating", "resting", "begin", "forward", "backward"]


@dataclass(frozen=True)
class Components:
    """Bytes on one device at one time, by what they are for."""

    weights: float = 0.0
    copies: float = 0.0  # of weights or gradients: gathered from other devices, or in buckets
    packed: float = 0.0  # copies of weights in the order or dtype in which decoding reads them
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0  # keys and values, or recurrent states, while generating
    logits: float = 0.0
    engine: float = 0.0  # of a rollout engine in the same process: its weights, KV cache and activations
    teacher: float = 0.0  # weights of a second model from which the policy learns

    @property
    def total(self) -> float:
        """Sum of all components."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class Sharding:
    """How a model and its training state are spread over N devices, over all nodes."""

    name: ClassVar[str]
    splits: ClassVar[bool] = False  # weights, gradients and optimizer state over all devices, which score modules together
    cpu_offload = False  # whether what a device has a part of lies in the memory of the host

    devices: int = 1

    @property
    def parts(self) -> int:
        """Devices over which weights, gradients and optimizer state are split."""
        return self.devices if self.splits else 1

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """Bytes of copies that a device has beside its part."""
        return 0.0


class SingleDevice(Sharding):
    """One device that holds everything."""

    name = "one device"


class DDP(Sharding):
    """Everything on each device, and the gradients once more, in the buckets in which they are summed."""

    name = "DDP"

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """See `Sharding`."""
        return 0.0 if moment in ("calibrating", "scoring") else sizes.trained_bytes


@dataclass(frozen=True)
class FSDP2(Sharding):
    """A part of everything on each device, and whole copies of the weights in use.

    While generating, all weights are in use; while updating, the weights of one or two blocks and what is outside of blocks. With
    `cpu_offload` the part is kept in the memory of the host, not on the device.
    """

    name, splits = "FSDP2", True

    cpu_offload: bool = False

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """See `Sharding`."""
        outside, block = sizes.outside_bytes, sizes.block_bytes
        copies: dict[Moment, float] = {
            "calibrating": sizes.base_bytes + outside,
            "scoring": outside + 2 * block,  # as in a backward pass, but a gradient leaves the device when it has been made
            # Weights outside of blocks are there twice: torch keeps what it received beside the gathered weights.
            "generating": sizes.weight_bytes + outside,
            "resting": max(block, outside),  # gathered for the engine one after another
            "begin": 2 * (outside + block),  # the first block is gathered while those outside of blocks are there twice
            "forward": outside + block,  # the last block as it was received
            # While one block computes, the next one is gathered, and gradients are whole until they are summed and split.
            "backward": outside + 2 * block + 2 * sizes.block_gradients,
        }
        return copies[moment]

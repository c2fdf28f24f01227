"""Weights, gradients and optimizer state on each of N devices, by Trainer strategy."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from hybrid_lightning.memory.sizes import ModelSizes

# Moments of a run:
# - calibrating, scoring: the base model samples, and makes the passes that score modules
# - generating: completions are sampled while gradients of the previous step exist
# - resting: a rollout engine with its own weights samples
# - begin, forward, backward: start of a training pass, end of its forward pass (with all gradients of earlier passes), and its
#   backward pass
Moment = Literal["calibrating", "scoring", "generating", "resting", "begin", "forward", "backward"]


@dataclass(frozen=True)
class Components:
    """Bytes on one device at one time, by purpose."""

    weights: float = 0.0
    copies: float = 0.0  # weights gathered from other devices, or gradients in buckets
    packed: float = 0.0  # copies of weights in the order or dtype that decoding reads
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0  # keys and values, or recurrent states, while generating
    logits: float = 0.0
    engine: float = 0.0  # weights, KV cache and activations of a rollout engine in the same process
    teacher: float = 0.0  # weights of a second model from which the policy learns

    @property
    def total(self) -> float:
        """Sum of all components."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class Sharding:
    """How a model and its training state are distributed over N devices of all nodes."""

    name: ClassVar[str]
    splits: ClassVar[bool] = False  # whether weights, gradients and optimizer state are split over devices
    cpu_offload = False  # whether a device's part is kept in the memory of the host

    devices: int = 1

    @property
    def parts(self) -> int:
        """Devices over which weights, gradients and optimizer state are split."""
        return self.devices if self.splits else 1

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """Bytes of copies that a device holds in addition to its part."""
        return 0.0


class SingleDevice(Sharding):
    """One device that holds everything."""

    name = "one device"


class DDP(Sharding):
    """Everything on each device, and a second copy of the gradients in the buckets that sum them."""

    name = "DDP"

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """See `Sharding`."""
        return 0.0 if moment in ("calibrating", "scoring") else sizes.trained_bytes


@dataclass(frozen=True)
class FSDP2(Sharding):
    """A part of everything on each device, and full copies of the weights in use.

    Generating uses all weights; updating uses the weights of one or two blocks, and the weights outside of blocks. With
    `cpu_offload` the part is kept in the memory of the host, not on the device.
    """

    name, splits = "FSDP2", True

    cpu_offload: bool = False

    def copies(self, moment: Moment, sizes: ModelSizes) -> float:
        """See `Sharding`."""
        outside, block = sizes.outside_bytes, sizes.block_bytes
        copies: dict[Moment, float] = {
            "calibrating": sizes.base_bytes + outside,
            "scoring": outside + 2 * block,  # as in a backward pass, but each gradient leaves the device as soon as it exists
            # Weights outside of blocks exist twice: torch keeps the received buffers in addition to the gathered weights.
            "generating": sizes.weight_bytes + outside,
            "resting": max(block, outside),  # gathered for the engine one after another
            "begin": 2 * (outside + block),  # the first block is gathered while the weights outside of blocks exist twice
            "forward": outside + block,  # the last block in its receive buffer
            # While one block computes, the next one is gathered, and gradients are unsharded until they are reduced.
            "backward": outside + 2 * block + 2 * sizes.block_gradients,
        }
        return copies[moment]

"""What each of N devices holds of weights, gradients and optimizer state, by strategy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hybrid_lightning.memory.sizes import ModelSizes


@dataclass(frozen=True)
class Held:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    copies: float = 0.0  # of weights or gradients, for a while


class Sharding(ABC):
    """How a model with its training state lies on devices.

    Args:
        devices: N, over all nodes.
    """

    name: ClassVar[str]
    whole_on_every_device: ClassVar[bool] = True

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices

    @abstractmethod
    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """While completions are sampled, with the gradients of the step before.

        Args:
            sizes: Of the model.
            optimizer: Bytes of state for each trained number.
        """

    @abstractmethod
    def updating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """In forward and backward passes, with all gradients there."""


class SingleDevice(Sharding):
    """All of it."""

    name = "one device"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return Held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer)

    def updating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return self.generating(sizes, optimizer)


class DDP(SingleDevice):
    """All of it on each device, and the gradients once more in the buckets in which they are summed."""

    name = "DDP"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return Held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer, copies=sizes.trained_bytes)


class FSDP2(Sharding):
    """A share of all, and the whole of what is computed with: every weight while generating, two blocks while updating."""

    name = "FSDP2"
    whole_on_every_device = False

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return self._shares(sizes, optimizer, sizes.weight_bytes)

    def updating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`.

        Beside the block that computes, the next one is gathered, and what is outside of blocks; a block's gradients are whole
        until they are summed and given to their devices.
        """
        return self._shares(sizes, optimizer, 2 * sizes.block_bytes + sizes.outside_bytes + 2 * sizes.block_gradients)

    def _shares(self, sizes: ModelSizes, optimizer: float, whole: float) -> Held:
        count = self.devices
        return Held(sizes.weight_bytes / count, sizes.trained_bytes / count, sizes.trainable * optimizer / count, copies=whole)


class FSDP1(FSDP2):
    """As FSDP2, but all weights have one dtype, and frozen ones have gradients of zero."""

    name = "FSDP1"

    def updating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        whole = 2 * sizes.block_bytes + sizes.outside_bytes + 2 * sizes.trained_width * sizes.block_parameters
        return self._shares(sizes, optimizer, whole)

    def _shares(self, sizes: ModelSizes, optimizer: float, whole: float) -> Held:
        held = super()._shares(sizes, optimizer, whole)
        return Held(held.weights, sizes.weight_bytes / self.devices, held.optimizer, held.copies)

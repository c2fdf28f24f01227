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
    host: float = 0.0  # of what would be on the device, in the memory of its host


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

    def begin(self, sizes: ModelSizes, optimizer: float) -> Held:
        """As a forward pass that trains begins, when it has computed nothing yet."""
        return self.forward(sizes, optimizer)

    @abstractmethod
    def forward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """At the end of a forward pass that trains, with all gradients of earlier ones."""

    def backward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """In a backward pass."""
        return self.forward(sizes, optimizer)


class SingleDevice(Sharding):
    """All of it."""

    name = "one device"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return Held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer)

    def forward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return self.generating(sizes, optimizer)


class DDP(SingleDevice):
    """All of it on each device, and the gradients once more in the buckets in which they are summed."""

    name = "DDP"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return Held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer, copies=sizes.trained_bytes)


class FSDP2(Sharding):
    """A share of all, and the whole of what is computed with: every weight while generating, one or two blocks while updating.

    Args:
        devices: N, over all nodes.
        cpu_offload: The share lies in the memory of the host, which is another than that of the device.
    """

    name = "FSDP2"
    whole_on_every_device = False

    def __init__(self, devices: int = 1, cpu_offload: bool = False) -> None:
        super().__init__(devices)
        self.cpu_offload = cpu_offload

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. What is outside of blocks is there twice: torch keeps what it received beside what it made of it."""
        return self._shares(sizes, optimizer, sizes.weight_bytes + sizes.outside_bytes)

    def begin(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. The first block comes while what is outside of blocks is there twice."""
        return self._shares(sizes, optimizer, 2 * (sizes.outside_bytes + sizes.block_bytes))

    def forward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. What is outside of blocks is there, and the last block as it was received."""
        return self._shares(sizes, optimizer, sizes.outside_bytes + sizes.block_bytes)

    def backward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`.

        Beside the block that computes, the next one is gathered; a block's gradients are whole until they are summed and given to
        their devices.
        """
        return self._shares(sizes, optimizer, sizes.outside_bytes + 2 * sizes.block_bytes + 2 * sizes.block_gradients)

    def _shares(self, sizes: ModelSizes, optimizer: float, whole: float) -> Held:
        return self._held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer, whole)

    def _held(self, weights: float, gradients: float, optimizer: float, whole: float) -> Held:
        """What one device has if all have so much together, and the whole of what it computes with."""
        held = Held(weights / self.devices, gradients / self.devices, optimizer / self.devices, whole)
        return Held(0, 0, 0, whole, held.weights + held.gradients + held.optimizer) if self.cpu_offload else held


class FSDP1(FSDP2):
    """As FSDP2, but all weights have one dtype, and frozen ones in blocks have gradients of zero."""

    name = "FSDP1"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return self._shares(sizes, optimizer, sizes.weight_bytes)

    def begin(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return self.forward(sizes, optimizer)

    def backward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        whole = sizes.outside_bytes + 2 * sizes.block_bytes + 2 * sizes.trained_width * sizes.block_parameters
        return self._shares(sizes, optimizer, whole)

    def _shares(self, sizes: ModelSizes, optimizer: float, whole: float) -> Held:
        # Outside of blocks nothing is trained. On the host the sums of the trained weights' gradients are beside those of a pass.
        gradients = sizes.weight_bytes - sizes.outside_bytes + (sizes.trained_bytes if self.cpu_offload else 0)
        return self._held(sizes.weight_bytes, gradients, sizes.trainable * optimizer, whole)

"""What each of N devices holds of weights, gradients and optimizer state, by Trainer strategy."""

from dataclasses import dataclass, replace
from typing import ClassVar

from hybrid_lightning.memory.sizes import ModelSizes


@dataclass(frozen=True)
class Held:
    """Bytes that one device holds."""

    weights: float
    gradients: float
    optimizer: float
    copies: float = 0.0  # temporary copies of weights or gradients
    host: float = 0.0  # in the memory of the host, where it would otherwise be on the device


class Sharding:
    """How a model and its training state are spread over devices.

    The methods give what one device holds at a stage of the run. Each takes the sizes of the model, and the bytes of optimizer
    state per trained parameter.

    Args:
        devices: Number N of devices, over all nodes.
    """

    name: ClassVar[str]
    whole_on_every_device: ClassVar[bool] = True  # False: each device has a share of the weights

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """While completions are sampled, with the gradients of the previous step; if nothing is split or copied, everything.

        Args:
            sizes: Sizes of the model.
            optimizer: Bytes of optimizer state per trained parameter.
        """
        return Held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer)

    @property
    def scoring_devices(self) -> int:
        """Devices that score modules together, each with a share of the base model; where it is one, it has all of it."""
        return 1

    def calibrating(self, sizes: ModelSizes, base: float) -> Held:
        """While completions are sampled by which modules are scored.

        Args:
            sizes: Sizes of the model.
            base: Bytes of the model as it was loaded.
        """
        return Held(base, 0, 0)

    def scoring(self, sizes: ModelSizes, base: float) -> Held:
        """In the passes by which modules are scored, but for gradients; arguments as of `calibrating`."""
        return Held(base, 0, 0)

    def resting(self, sizes: ModelSizes, optimizer: float) -> Held:
        """While a rollout engine with weights of its own samples."""
        return self.generating(sizes, optimizer)

    def begin(self, sizes: ModelSizes, optimizer: float) -> Held:
        """At the beginning of a training forward pass, before it has computed anything."""
        return self.forward(sizes, optimizer)

    def forward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """At the end of a training forward pass, with all gradients of earlier passes."""
        return self.generating(sizes, optimizer)

    def backward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """During a backward pass."""
        return self.forward(sizes, optimizer)


class SingleDevice(Sharding):
    """One device that holds everything."""

    name = "one device"


class DDP(Sharding):
    """Everything on each device, and the gradients once more, in the buckets in which they are summed."""

    name = "DDP"

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`."""
        return replace(super().generating(sizes, optimizer), copies=sizes.trained_bytes)


class FSDP2(Sharding):
    """A share of everything on each device, and whole copies of the weights in use.

    While generating, all weights are in use; while updating, those of one or two blocks and what is outside of blocks.

    Args:
        devices: Number N of devices, over all nodes.
        cpu_offload: Whether the share is kept in the memory of the host, not on the device.
    """

    name = "FSDP2"
    whole_on_every_device = False

    def __init__(self, devices: int = 1, cpu_offload: bool = False) -> None:
        super().__init__(devices)
        self.cpu_offload = cpu_offload

    @property
    def scoring_devices(self) -> int:
        """See `Sharding`."""
        return self.devices

    def calibrating(self, sizes: ModelSizes, base: float) -> Held:
        """See `Sharding`. As while generating."""
        whole = base + sizes.outside_bytes
        return super().calibrating(sizes, base) if self.scoring_devices == 1 else self._held(base, 0, 0, whole)

    def scoring(self, sizes: ModelSizes, base: float) -> Held:
        """See `Sharding`. As in a training pass, but that a gradient leaves the device when it has been made."""
        whole = sizes.outside_bytes + 2 * sizes.block_bytes
        return super().scoring(sizes, base) if self.scoring_devices == 1 else self._held(base, 0, 0, whole)

    def generating(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. Weights outside of blocks are there twice: torch keeps what it received beside the gathered weights."""
        return self._shares(sizes, optimizer, sizes.weight_bytes + sizes.outside_bytes)

    def resting(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. Weights are gathered for the engine, of a block at most, or outside of blocks."""
        return self._shares(sizes, optimizer, max(sizes.block_bytes, sizes.outside_bytes))

    def begin(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. The first block is gathered while the weights outside of blocks are there twice."""
        return self._shares(sizes, optimizer, 2 * (sizes.outside_bytes + sizes.block_bytes))

    def forward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`. The weights outside of blocks are there, and the last block as it was received."""
        return self._shares(sizes, optimizer, sizes.outside_bytes + sizes.block_bytes)

    def backward(self, sizes: ModelSizes, optimizer: float) -> Held:
        """See `Sharding`.

        While one block computes, the next one is gathered. A block's gradients are whole until they have been summed over devices
        and split.
        """
        return self._shares(sizes, optimizer, sizes.outside_bytes + 2 * sizes.block_bytes + 2 * sizes.block_gradients)

    def _shares(self, sizes: ModelSizes, optimizer: float, whole: float) -> Held:
        return self._held(sizes.weight_bytes, sizes.trained_bytes, sizes.trainable * optimizer, whole)

    def _held(self, weights: float, gradients: float, optimizer: float, whole: float) -> Held:
        """What one device holds: its share of these bytes, which all devices hold together, and `whole` bytes of copies."""
        held = Held(weights / self.devices, gradients / self.devices, optimizer / self.devices, whole)
        return Held(0, 0, 0, whole, held.weights + held.gradients + held.optimizer) if self.cpu_offload else held


class FSDP1(FSDP2):
    """Like FSDP2, but all weights have the same dtype, and frozen weights in blocks have gradients too, which are zero."""

    name = "FSDP1"

    @property
    def scoring_devices(self) -> int:
        """See `Sharding`."""
        return 1

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
        # Nothing outside of blocks is trained. With offload, the host also has the summed gradients of trained weights beside
        # those of a pass.
        gradients = sizes.weight_bytes - sizes.outside_bytes + (sizes.trained_bytes if self.cpu_offload else 0)
        return self._held(sizes.weight_bytes, gradients, sizes.trainable * optimizer, whole)

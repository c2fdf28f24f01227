"""What each of N devices holds of weights, gradients and optimizer state, by Trainer strategy."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from hybrid_lightning.memory.sizes import ModelSizes

# Moments of a run: completions are sampled, with the gradients of the previous step; a rollout engine with weights of its own
# samples; and of a training pass its beginning, before it has computed anything, the end of its forward pass, with all gradients
# of earlier passes, and its backward pass.
Moment = Literal["generating", "resting", "begin", "forward", "backward"]
PASS: tuple[Moment, ...] = ("begin", "forward", "backward")


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

    @property
    def total(self) -> float:
        """Sum of all components."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class Sharding:
    """How a model and its training state are spread over N devices, over all nodes."""

    name: ClassVar[str]
    whole_on_every_device: ClassVar[bool] = True  # False: each device has a share of the weights, and all score modules together

    devices: int = 1

    @property
    def offloads(self) -> bool:
        """Whether what a device has a share of lies in the memory of the host."""
        return False

    def held(self, moment: Moment, sizes: ModelSizes, optimizer: float) -> Components:
        """What one device holds; `optimizer` are the bytes of optimizer state per trained parameter."""
        copies, state = self._copies(moment, sizes), sizes.trainable * optimizer
        return Components(sizes.weight_bytes, copies, gradients=sizes.trained_bytes, optimizer=state)

    def host(self, sizes: ModelSizes, optimizer: float) -> float:
        """Bytes of it that lie in the memory of the host instead."""
        return 0.0

    def held_to_score(self, moment: Literal["calibrating", "scoring"], sizes: ModelSizes, base: float) -> Components:
        """What one device holds while completions are sampled that score modules, and in the passes that score them.

        Gradients are left out. `base` are the bytes of the model as it was loaded.
        """
        return Components(base)

    def _copies(self, moment: Moment, sizes: ModelSizes) -> float:
        return 0.0


class SingleDevice(Sharding):
    """One device that holds everything."""

    name = "one device"


class DDP(Sharding):
    """Everything on each device, and the gradients once more, in the buckets in which they are summed."""

    name = "DDP"

    def _copies(self, moment: Moment, sizes: ModelSizes) -> float:
        return sizes.trained_bytes


@dataclass(frozen=True)
class FSDP2(Sharding):
    """A share of everything on each device, and whole copies of the weights in use.

    While generating, all weights are in use; while updating, the weights of one or two blocks and what is outside of blocks. With
    `cpu_offload` the share is kept in the memory of the host, not on the device.
    """

    name = "FSDP2"
    whole_on_every_device = False

    cpu_offload: bool = False

    @property
    def offloads(self) -> bool:
        """See `Sharding`."""
        return self.cpu_offload

    def held(self, moment: Moment, sizes: ModelSizes, optimizer: float) -> Components:
        """See `Sharding`."""
        return self._split(super().held(moment, sizes, optimizer))

    def host(self, sizes: ModelSizes, optimizer: float) -> float:
        """See `Sharding`."""
        share = self._share(super().held("forward", sizes, optimizer))
        return share.weights + share.gradients + share.optimizer if self.cpu_offload else 0.0

    def held_to_score(self, moment: Literal["calibrating", "scoring"], sizes: ModelSizes, base: float) -> Components:
        """See `Sharding`."""
        if self.devices == 1:
            return Components(base)
        # As while generating; or as in a training pass, but that a gradient leaves the device when it has been made.
        copies = sizes.outside_bytes + (base if moment == "calibrating" else 2 * sizes.block_bytes)
        return self._split(Components(base, copies))

    def _copies(self, moment: Moment, sizes: ModelSizes) -> float:
        outside, block = sizes.outside_bytes, sizes.block_bytes
        copies: dict[Moment, float] = {
            # Weights outside of blocks are there twice: torch keeps what it received beside the gathered weights.
            "generating": sizes.weight_bytes + outside,
            "resting": max(block, outside),  # gathered for the engine one after another
            "begin": 2 * (outside + block),  # the first block is gathered while those outside of blocks are there twice
            "forward": outside + block,  # the last block as it was received
            # While one block computes, the next one is gathered, and gradients are whole until they are summed and split.
            "backward": outside + 2 * block + 2 * sizes.block_gradients,
        }
        return copies[moment]

    def _split(self, held: Components) -> Components:
        """What one device holds of what all hold together; copies are its own."""
        return Components(copies=held.copies) if self.cpu_offload else self._share(held)

    def _share(self, held: Components) -> Components:
        weights, gradients, optimizer = (part / self.devices for part in (held.weights, held.gradients, held.optimizer))
        return replace(held, weights=weights, gradients=gradients, optimizer=optimizer)

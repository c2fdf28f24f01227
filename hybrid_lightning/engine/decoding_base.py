"""`PackedDecoding`: what the ways to decode packed models share. The prompts go through the model as one packed sequence."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from hybrid_lightning.engine.attention import AttentionSettings
from hybrid_lightning.engine.passes import prepacked_projection
from hybrid_lightning.types import Sequences

if TYPE_CHECKING:
    from hybrid_lightning.engine.engine import Engine  # with PEFT, which is slow to import


class PackedDecoding(ABC):
    """Base of `Decoding` for models that can be packed. It is the `Packing` of its own steps.

    Args:
        engine: Engine of the model.
        ids: Prompts [P, S], left-padded.
        mask: [P, S] bool.
        max_new_tokens: Longest completion.
    """

    leave_together = 1 / 16  # not one by one, so that products have few different sizes (see `packing.py`)

    def __init__(self, engine: "Engine", ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        self.engine, self.max_new_tokens = engine, max_new_tokens
        self.prepack_projection()
        self.layout = engine.packed(Sequences(ids, mask, ids[:, :0], mask[:, :0]), completions=False)
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of the prompts
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of completions
        self.lengths = mask.sum(dim=1)  # tokens of each prompt

    def prepack_projection(self) -> None:
        """Make the function from hidden states [N, H] to logits [N, V]; to be made again after a change of the weights."""
        self.project = prepacked_projection(self.engine.model, self.engine.backend)

    def read_prompts(self) -> Tensor:
        """Store keys and values of the prompts; returns logits [P, V] of the first token behind each."""
        hidden = self.engine.hidden(self.layout.ids, self.layout.positions, _Prefill(self))
        return self.project(hidden[self.layout.last_prompt_token])

    @abstractmethod
    def store_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Keep a layer's keys and values of the prompts; see `Packing`."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """One token of every row; see `Packing`."""


class _Prefill:
    """The packing of the prompts' pass, which also stores their keys and values."""

    def __init__(self, decoding: PackedDecoding) -> None:
        self.decoding = decoding

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `Packing`."""
        self.decoding.store_prompts(layer, query, key, value, settings)
        return self.decoding.layout.attend(layer, query, key, value, settings)

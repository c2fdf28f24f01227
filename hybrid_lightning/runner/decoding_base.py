"""`PackedDecoding`: base class for decoding with packed models. The prompts go through the model as one packed sequence."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lightning.runner.attention import AttentionSettings, Packing
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.packing import MULTIPLE, PackedSequences
from hybrid_lightning.runner.passes import prepacked_projection
from hybrid_lightning.types import Sequences


class PackedModel(Protocol):
    """The part of `ModelRunner` that decoding uses (a protocol, since `model_runner.py` imports this file)."""

    model: nn.Module
    backend: Backend

    def packed(self, sequences: Sequences, completions: bool = True) -> PackedSequences:
        """Pack sequences into the layout that the model's attention uses."""

    def hidden(self, ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """Hidden states [N, H] of N packed tokens before the output layer, or [W, H] of those `wanted`."""


@dataclass(frozen=True)
class Added:
    """N tokens that R rows read in one pass, row by row."""

    rows: Tensor  # [R], the index of each row among all rows
    owner: Tensor  # [N], which of these R rows each token belongs to
    counts: Tensor  # [N], completion tokens of its row up to and including it
    begins: Tensor  # [R + 1], where the tokens of each row begin, and the end
    most: int  # most new tokens in one row
    longest: int  # most completion tokens in one row, the new ones included

    @classmethod
    def of(cls, rows: Sequence[int], kept: Sequence[int], sizes: Sequence[int], device: torch.device) -> "Added":
        """For rows that keep `kept` completion tokens and read `sizes` more."""
        row, before, size = torch.tensor([rows, kept, sizes], device=device)
        begins = F.pad(size.cumsum(0), (1, 0))
        total = sum(sizes)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=device), size, output_size=total)
        counts = torch.arange(1, total + 1, device=device) + (before - begins[:-1])[owner]
        return cls(row, owner, counts, begins, max(sizes), max(map(sum, zip(kept, sizes, strict=True))))


class _Pass(NamedTuple):
    """A `Packing` for one pass."""

    attend: Callable[[int, Tensor, Tensor, Tensor, AttentionSettings], Tensor]


class PackedDecoding(ABC):
    """Base of `Decoding` for models that can be packed, and the `Packing` of its own steps. For arguments see `decoding_of`."""

    leave_together = 1 / 16  # rows leave in batches, so that products have few different sizes (see `packing.py`)
    can_extend = True
    samples = 1  # of each prompt

    def __init__(self, runner: PackedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, keeps_rows: bool = False) -> None:
        self.runner, self.max_new_tokens, self.keeps_rows = runner, max_new_tokens, keeps_rows
        self.project = prepacked_projection(runner.model, runner.backend)  # from hidden states [N, H] to logits [N, V]
        self.layout = runner.packed(Sequences(ids, mask, ids[:, :0], mask[:, :0]), completions=False)
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of the prompts
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of completions
        self.lengths = mask.sum(dim=1)  # tokens of each prompt

    def read_prompts(self) -> Tensor:
        """Store keys and values of the prompts; returns logits [P, V] of the first token after each."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
            self.store_prompts(layer, query, key, value, settings)
            return self.layout.attend(layer, query, key, value, settings)

        hidden = self.runner.hidden(self.layout.ids, self.layout.positions, _Pass(attend))
        return self.project(hidden[self.layout.last_prompt_token])

    def extend(self, rows: Sequence[int], kept: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Let rows read several tokens each, all as one packed sequence."""
        assert self.keeps_rows, "rows have to keep their places"
        device = self.lengths.device
        added = Added.of(rows, kept, [len(part) for part in tokens], device)
        self.resume(added)
        total = len(added.owner)
        filling = -total % MULTIPLE  # tokens without meaning that round the size up

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
            found = self.attend_added(layer, query[:total], key[:total], value[:total], settings, added)
            return F.pad(found, (0, 0, 0, 0, 0, filling)) if filling else found

        ids = torch.tensor([token for part in tokens for token in part] + [0] * filling, device=device)
        positions = self.lengths[added.rows // self.samples][added.owner] + added.counts - 1
        last = added.begins[1:] - 1
        return self.project(self.runner.hidden(ids, F.pad(positions, (0, filling)), _Pass(attend), last))

    @abstractmethod
    def resume(self, added: Added) -> None:
        """Continue with these rows, in the state after these tokens."""

    def attend_added(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, added: Added
    ) -> Tensor:
        """Attention for added tokens, where `attend` takes one token per row. `resume` came before it."""
        return self.attend(layer, query, key, value, settings)

    @abstractmethod
    def store_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Keep a layer's keys and values of the prompts; for shapes see `Packing`."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention for one token of every row; see `Packing`."""

"""`SegmentDecoding`: decoding on accelerators with kernels for attention by segments (see `segments.py`). It copies no keys.

Keys and values of the prompts stay as their pass made them: [tokens, K, D], one prompt after the other. Completions have a buffer
of full length, [B T, K, D], where a row keeps its place while it runs: when other rows end, only the list of slots gets shorter.
A step attends in two parts that are combined by their log-sum-exps. All rows of a prompt attend to the prompt's keys in one call,
and each row attends to its own keys so far. R query heads that share a key-value head become R queries, so each part reads a key
once.

Only the device knows how long the rows are. The tensors of a step keep their addresses and shapes from token to token until rows
leave, and no step waits for the device.

Axes as in `attention.py`: B rows, some of them still running; T tokens of the longest completion.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.backend import autocast_dtype
from hybrid_lightning.runner.decoding_base import Added, PackedDecoding
from hybrid_lightning.runner.segments import Attended, Segments, attend, attending, grouped, joined, ungrouped
from hybrid_lightning.runner.step_graphs import Graphs, StepGraph

_LASTING = 8  # steps with the same rows before one is recorded: recording costs about what this many replays save
_Call = Callable[[Tensor, Tensor, Tensor], Attended]  # of queries, keys and values


class SegmentDecoding(PackedDecoding):
    """`Decoding` for models that attend by segments, without a window that could hide a prompt's keys; see `PackedDecoding`."""

    graphs: Graphs | None = None  # replays steps from CUDA graphs, one for each set of rows that lasts; None for plain steps
    _ends_differ = False  # whether rows may fill their space in the buffer while others continue

    slots: Tensor  # [R], the index of each running row among all rows
    positions: Tensor  # [R], position of the token that a step reads
    places: Tensor  # [R], where its key goes in the flat buffer
    used: Tensor  # [R] int32, keys of each row in the buffer
    _calls: dict[int, tuple[_Call, _Call]]  # layer -> attention to the prompts' keys, and to the rows' own keys
    _steps: int  # taken with these rows
    _graph: StepGraph | None

    def prefill(self, samples: int) -> Tensor:
        """Read the prompts as one packed sequence, and start a row for each completion."""
        logits, self.samples = self.read_prompts(), samples
        self._start(torch.arange(len(self.lengths) * samples, device=self.lengths.device))
        self.used = torch.zeros(len(self.slots), dtype=torch.int32, device=self.slots.device)
        return logits.repeat_interleave(samples, dim=0, output_size=len(self.slots))

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row. With `graphs` everything before the output layer is replayed."""
        graphs = self.graphs
        return self.project(self._step(tokens) if graphs is None or graphs.why_not else self._recorded(graphs, tokens))

    def _recorded(self, graphs: Graphs, tokens: Tensor) -> Tensor:
        """Hidden states [R, n]. The step is recorded after a few plain ones, which allocate or compile all that it needs."""
        if self._graph is None and self._steps == _LASTING:
            self._graph = graphs.record(self._step, tokens)
        self._steps += 1
        if self._graph is None:
            return self._step(tokens)
        return self._graph.replay(tokens) if graphs.passed else self._tried(graphs, self._graph, tokens)

    def _tried(self, graphs: Graphs, graph: StepGraph, tokens: Tensor) -> Tensor:
        """Run a step both ways, replayed and plain, and compare the results."""
        known = [self.places, self.used, self.positions]
        before = [part.clone() for part in known]
        replayed = graph.replay(tokens).clone()
        for part, value in zip(known, before, strict=True):
            part.copy_(value)
        plain = self._step(tokens)
        graphs.compare(replayed, plain)
        return plain

    def _step(self, tokens: Tensor) -> Tensor:
        # A row without space has ended, though it may still be among the running rows.
        new = self.used < self.max_new_tokens if self._ends_differ else 1
        self.places += new
        self.used += new
        self.positions += new
        return self.runner.hidden(tokens, self.positions, self)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows only, in ascending order."""
        used, positions = self.used[rows], self.positions[rows]
        self._start(self.slots[rows])
        self.used, self.positions = used, positions
        self.places += used

    def resume(self, added: Added) -> None:
        """Start these rows, each with its tokens so far."""
        self._start(added.rows)
        self._ends_differ = True
        used = added.counts[added.begins[1:] - 1]
        self.used = used.int()
        self.positions += used
        self.places += used

    def _start(self, slots: Tensor) -> None:
        """Continue with the rows in these slots, [B] ascending, in the state after the prompt."""
        self.slots = slots
        prompt = slots // self.samples
        self.positions = self.lengths[prompt] - 1
        self.places = slots * self.max_new_tokens - 1
        # Where the rows of each prompt begin. The slots are sorted, so nothing has to be counted.
        firsts = torch.arange(len(self.lengths) + 1, device=slots.device) * self.samples
        self.first_rows = torch.searchsorted(slots, firsts).int()
        self.own_begins = torch.cat([slots, slots[-1:] + 1]).mul_(self.max_new_tokens).int()
        self._calls = {}
        self._steps, self._graph = 0, None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the new keys and values, then attend to the prompt's keys and the row's own."""
        kept, heads = self.cache(layer), key.shape[1]
        for cache, new in zip(kept, (key, value), strict=True):
            cache.index_copy_(0, self.places, new.to(cache.dtype))
        shared, own = self.attend_to_kept(layer, grouped(query.to(kept[0].dtype), heads), settings)
        return ungrouped(joined(shared, own).result, query.shape[1] // heads)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of completions, [B T, K, D], with space for all tokens; a step writes to `places`."""
        if layer not in self.own:
            places = len(self.lengths) * self.samples * self.max_new_tokens
            keys, values = (part.new_empty(places, *part.shape[1:]) for part in self.prompt[layer])
            self.own[layer] = (keys, values)
        return self.own[layer]

    def attend_to_kept(self, layer: int, query: Tensor, settings: AttentionSettings) -> tuple[Attended, Attended]:
        """Attention of one token per row to the prompts' keys and to the row's keys, with its own key already in the cache.

        Queries are `grouped`.
        """
        if layer not in self._calls:
            repeats, prompts = len(query) // len(self.slots), self.layout.layout.prompts
            begins = torch.arange(len(self.slots) + 1, dtype=torch.int32, device=self.slots.device) * repeats
            most = self.samples * repeats
            to_prompts = Segments(self.first_rows * repeats, prompts.keys, most, prompts.most_keys, causal=False)
            to_own = Segments(begins, self.own_begins, repeats, self.max_new_tokens, causal=False)
            self._calls[layer] = (attending(query, to_prompts, settings), attending(query, to_own, settings, self.used))
        shared, own = self._calls[layer]
        return shared(query, *self.prompt[layer]), own(query, *self.own[layer])

    def attend_added(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, added: Added
    ) -> Tensor:
        """`attend` for several tokens of each row, which see each other causally."""
        query = _as_kept(query)
        places = self.slots[added.owner] * self.max_new_tokens + added.counts - 1
        for cache, new in zip(self.cache(layer), (key, value), strict=True):
            cache.index_copy_(0, places, new.to(cache.dtype))
        prompts, begins = self.layout.layout.prompts, added.begins.int()
        shared = Segments(begins[self.first_rows], prompts.keys, self.samples * added.most, prompts.most_keys, causal=False)
        own = Segments(begins, self.own_begins, added.most, self.max_new_tokens, causal=True)
        both = (attend(query, *self.prompt[layer], shared, settings), attend(query, *self.own[layer], own, settings, self.used))
        return joined(*both).result

    def store_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Keep a layer's keys and values of the prompts, without the filling tokens."""
        tokens, kept = self.layout.prompt_tokens, _as_kept(value)
        self.prompt[layer] = (key[:tokens].to(kept.dtype).contiguous(), kept[:tokens].contiguous())


def _as_kept(part: Tensor) -> Tensor:
    """Convert to the dtype of keys and values: under autocast, rotary embeddings may have made queries float32."""
    return part.to(autocast_dtype(part.device) or part.dtype)

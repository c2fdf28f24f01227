"""Passes of models that cannot share prompts in a packed sequence: each prompt is still read once, and little is padding.

Recurrent layers (gated delta nets, state spaces, short convolutions) carry a state from token to token. In a packed sequence the
state would leak from one sequence, or one completion of a prompt, into the next. But such layers have a cache. So the prompts are
read first,

    prompts [P, S] -> cache: keys and values, or states of recurrent layers -> copies for the G completions of each [P G, T]

and completions continue from copies of their prompt's cache. Gradients flow back through the copies, so a prompt is computed once
in either direction, as in a packed pass. Gradient checkpointing leaves no cache, and sharded ranks must make the same number of
passes. In both cases each row is read with its own copy of the prompt.

GPU kernels of other packages (flash-linear-attention, causal-conv1d, mamba-ssm) reset the state at given sequence boundaries;
transformers' own code cannot. With these kernels rows are packed, each with its prompt, where prompts cannot be shared or are
so short that padding would cost more.

Rows of about the same length lie together in a *band*, which is padded to its longest row. Axes: B rows, P prompts, S prompt
tokens, T completion tokens, K sampled tokens, H numbers of a hidden state.
"""

import inspect
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.packing import PackedSequences, begins_group, similar_lengths
from hybrid_lightning.runner.passes import base_model, decoder_of, own_hidden, position_ids, recomputes_activations
from hybrid_lightning.types import Sequences


class _PromptCache(DynamicCache):
    """A cache of prompts, copied for their completions. It can be continued once.

    Args:
        prompts: The cache after P prompts.
        counts: Completions of each.
    """

    def __init__(self, prompts: DynamicCache, counts: list[int]) -> None:
        super().__init__()
        self.layers = [copy(layer) for layer in prompts.layers]
        for layer in self.layers:
            for name, value in vars(layer).items():
                if isinstance(value, dict):  # states of recurrent layers: number -> state
                    value = {number: _repeated(state, counts) for number, state in value.items()}
                setattr(layer, name, _repeated(value, counts))

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        """Write nothing: a layer's backward pass needs its initial state, and no pass continues from here."""
        return recurrent_states


def _repeated(value: Any, counts: list[int]) -> Any:
    """Repeat each row of a tensor [P, ...] `counts` times; gradients are added up in a fixed order."""
    if not isinstance(value, Tensor) or value.shape[:1] != (len(counts),):
        return value
    return torch.cat([row[None].expand(count, *row.shape) for row, count in zip(value, counts, strict=True)])


def decoder_hidden(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Hidden states [B, L, H] before the output layer; for arguments see `last_logits`."""
    decoder = decoder_of(model)
    accepted = inspect.signature(decoder.forward).parameters
    arguments: dict[str, Any] = {"position_ids": positions} if "position_ids" in accepted else {}
    if cache is not None:
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache  # the older name
    hidden: Tensor = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=cache is not None, **arguments)[0]
    return hidden


def packed_rows_hidden(model: nn.Module, sequences: Sequences, backend: Backend) -> Tensor:
    """Like `padded_hidden`, with all rows packed, each with its prompt; layers receive the sequence boundaries."""
    mask, device = sequences.sampled_mask, sequences.sampled_mask.device
    own = torch.arange(mask.shape[1], device=device) < _read(sequences)[:, None]
    seen = torch.cat([sequences.prompt_mask, own], dim=1)
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1)
    packed = PackedSequences(Sequences(ids, seen, ids[:, :0], seen[:, :0]), backend, completions=False)
    lengths = seen.sum(dim=1)
    if packed.filling:
        lengths = torch.cat([lengths, lengths.new_tensor([packed.filling])])
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    number = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None].int()
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "seq_idx": number}  # transformers' names
    hidden = own_hidden(model, packed.ids, packed.positions, packed, **boundaries)
    before = (seen.flatten().cumsum(0) - 1).view_as(seen)[:, -1 - mask.shape[1] : -1]  # the token before each of a completion
    return hidden.index_select(0, before[mask])


def packs_rows(model: nn.Module, sequences: Sequences) -> bool:
    """Whether `packed_rows_hidden` reads fewer tokens than `padded_hidden` would."""
    if why_recomputed(model):
        return True
    prompts, read, first = sequences.prompt_mask.sum(dim=1), _read(sequences), begins_group(sequences)
    padded = 0
    for rows in similar_lengths(prompts):
        padded += int(first[rows].sum()) * int(prompts[rows].max())
        padded += sum(len(cells) * int(read[rows][cells].max()) for cells in similar_lengths(read[rows]))
    return int((prompts + read).sum()) < padded


def _read(sequences: Sequences) -> Tensor:
    """Completion tokens [B] to read: all before the last sampled one, since it and later ones predict nothing."""
    mask = sequences.sampled_mask
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)


def padded_hidden(model: nn.Module, sequences: Sequences) -> Tensor:
    """The states [K, H] that predict the K sampled tokens, in the order of `sampled_mask` flattened."""
    sharded, shares = _is_sharded(model), not why_recomputed(model)
    mask, device = sequences.sampled_mask, sequences.sampled_mask.device
    read = _read(sequences)
    prompts = sequences.prompt_mask.sum(dim=1)
    group = begins_group(sequences).long().cumsum(0)
    number = torch.zeros_like(sequences.completion_ids)  # [B, T]: index of the state that predicts each token
    parts: list[Tensor] = []
    begin = 0

    def add(states: Tensor, rows: Tensor, time: int) -> None:
        """Add states [b, t, H] that predict tokens of some rows, starting at a time."""
        nonlocal begin
        count, length = states.shape[:2]
        numbers = torch.arange(begin, begin + count * length, device=device).view(count, length)
        number[rows[:, None], torch.arange(time, time + length, device=device)] = numbers
        parts.append(states.flatten(0, 1))
        begin += count * length

    for rows in [torch.arange(len(group), device=device)] if sharded else similar_lengths(prompts if shares else prompts + read):
        first = sequences.rows(rows)
        if not shares:
            length = int(read[rows].max()) if not sharded else mask.shape[1] - 1
            seen = torch.cat([first.prompt_mask, first.completion_mask[:, :length]], dim=1)
            ids = torch.cat([first.prompt_ids, first.completion_ids[:, :length]], dim=1)
            hidden = decoder_hidden(model, ids, seen, position_ids(seen))
            add(hidden[:, -1 - length :], rows, 0)
            continue
        of_row, counts = group[rows].unique_consecutive(return_inverse=True, return_counts=True)[1:]
        own = counts.cumsum(0) - counts
        seen, cache = first.prompt_mask[own], DynamicCache(config=base_model(model).config)
        hidden = decoder_hidden(model, first.prompt_ids[own], seen, position_ids(seen), cache)
        add(_repeated(hidden[:, -1:], counts.tolist()), rows, 0)
        for cells in similar_lengths(read[rows]):
            length = int(read[rows][cells].max())
            if length:
                many = of_row[cells].bincount(minlength=len(own)).tolist()
                ids, before = first.completion_ids[cells, :length], first.prompt_mask[cells]
                positions = prompts[rows][cells, None] + torch.arange(length, device=device)
                # Padding after a row's last token is read like tokens: no real token sees it.
                seen = torch.cat([before, before.new_ones(len(cells), length)], dim=1)
                add(decoder_hidden(model, ids, seen, positions, _PromptCache(cache, many)), rows[cells], 1)
    return torch.cat(parts).index_select(0, number[mask])


def why_recomputed(model: nn.Module) -> str:
    """Why `padded_hidden` recomputes a prompt for each of its completions; empty where it does not."""
    if recomputes_activations(model):
        return "gradient checkpointing leaves no cache that prompts could be read into"
    return "the model is sharded, and a cache would make ranks wait for each other" if _is_sharded(model) else ""


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks have to make passes together."""
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return any(isinstance(module, FSDPModule) for module in model.modules())

"""Bytes that passes through a model hold at their peak, in closed form: updating, scoring, and decoding.

What a token keeps is in `engine/activations.py`. Here it is multiplied by the tokens of a pass, and what does not grow with them
is added: weights that autocast converts, blocks of logits, copies of weights for decoding.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.engine import Backend, Engine, TokenSizes, UnsupportedAttentionError, begins_group, has_operators
from hybrid_lightning.engine.backend import packs
from hybrid_lightning.engine.fused_layers import FusedMLP, FusedRMSNorm, use_fused_layers
from hybrid_lightning.engine.packing import MULTIPLE
from hybrid_lightning.engine.passes import plain_projection
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import FLOAT32_BYTES, ModelSizes
from hybrid_lightning.rollout.batching import split_by_tokens
from hybrid_lightning.types import Sequences

# Hidden vectors that norms keep in float32, at most, where the engine does not fuse them: Gemma's, of which a layer has four.
_NORMS = 14


@dataclass(frozen=True)
class PassBytes:
    """Bytes that a pass holds at its peak."""

    activations: float
    logits: float
    backward: float = 0.0  # everything that the backward pass holds at its peak
    cache: float = 0.0  # keys and values, or recurrent states
    packed: float = 0.0  # copies of weights in the order or dtype in which products read them


class Passes:
    """The passes of a run with the model on the meta device, whose layers are fused as the engine does.

    In all methods `sizes` are None for the base model as it is scored.

    Attributes:
        bounds: What is bounded from above and not predicted, in words for the user.
    """

    def __init__(self, settings: RunSettings, model: PreTrainedModel) -> None:
        self.settings, self.sizes = settings, TokenSizes(settings.config)
        self.width, self.base_width = settings.product_dtype.itemsize, settings.dtype.itemsize
        layers = find_candidates(model).values()
        self._linear = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        self._prepacks = all(type(layer) is nn.Linear for layer in layers)
        self._plain_projection = plain_projection(model) is not None
        self._head_norms = any(name.endswith(".q_norm") for name, _ in model.named_modules())
        attention = settings.attention or model.config._attn_implementation
        why_not_packed = _why_not_packed(model, settings.product_dtype)
        self.packs, self._keeps_scores = not why_not_packed, bool(why_not_packed) and attention == "eager"
        use_fused_layers(model, Backend())
        kinds = {type(module) for module in model.modules()}
        self._fused, self._fused_mlp = FusedRMSNorm in kinds, FusedMLP in kinds
        self.bounds = self._bounds(why_not_packed)

    def update(self, rows: Sequences, sizes: ModelSizes | None) -> PassBytes:
        """A forward and backward pass over some rows."""
        of_token, width = self.sizes, self.width
        tokens, predicted = self._tokens(rows), rows.completion_ids.numel()
        layers = [tokens * self._kept(recurs, rows, sizes) for recurs in of_token.recurs]
        converted, logits = self._converted(sizes), self._logits(predicted)
        within = tokens * self._kept_within_backward(sizes)
        # The states before and after the last norm, and the gradients of those that predict, which come with the logits.
        kept: float = width * of_token.hidden * (2 * tokens + predicted * (1 + self.settings.entropy_gradient))
        if self.settings.gradient_checkpointing:
            kept += len(layers) * tokens * self.base_width * of_token.hidden
            within += max(layers) + converted / len(layers)
        else:
            kept += sum(layers) + converted
        return PassBytes(kept, logits, backward=kept + within + (0 if self.packs and self._plain_projection else logits))

    def decoding(self, prompts: int, samples: int, sizes: ModelSizes | None) -> PassBytes:
        """The sampling of `samples` completions of full length for each of the prompts that a device completes together.

        The peak is where the prompts are read, or at the last token.
        """
        of_token, rows = self.sizes, prompts * samples
        asked, answered = self.settings.prompt_tokens, self.settings.completion_tokens
        keys = FLOAT32_BYTES if self._attends_by_products else self.width
        token = of_token.attending * (keys * of_token.keys + self.width * of_token.values)
        places = prompts * asked + rows * answered if self.packs else rows * (asked + answered)
        cache = token * places + rows * sum(of_token.recurs) * of_token.states.bytes(self.width)
        # A layer keeps nothing; half of what it keeps for a backward pass is there at a time.
        within = max(of_token.kept(recurs).bytes(self.width) for recurs in of_token.recurs) / 2
        logits = FLOAT32_BYTES * rows * of_token.vocabulary
        repeats = not self.packs or (not self.settings.flags.on_cpu and self.width == FLOAT32_BYTES)  # keys for all heads
        step = rows * (within + repeats * 2 * self.width * (asked + answered) * of_token.queries)
        reading = prompts * asked * (token + within)
        return PassBytes(max(step, reading - cache - logits), logits, cache=cache, packed=self._packed(sizes))

    def cut(self, rows: Sequences, tokens: int) -> list[Sequences]:
        """Rows of each pass, by the most tokens of a pass."""
        return [rows.rows(run) for run in split_by_tokens(rows, tokens)]

    def _tokens(self, rows: Sequences) -> int:
        """Tokens that are computed: in a packed pass each prompt once, and no completion's last token."""
        prompt, completion = rows.prompt_ids.shape[1], rows.completion_ids.shape[1]
        if not self.packs:
            return len(rows) * (prompt + completion)
        tokens = int(begins_group(rows).sum()) * prompt + len(rows) * (completion - 1)
        return tokens + -tokens % MULTIPLE

    def _kept(self, recurs: bool, rows: Sequences, sizes: ModelSizes | None) -> float:
        """Bytes that a token keeps in a layer."""
        of_token, width, share = self.sizes, self.width, _share_full(sizes)
        if recurs or not self._fused:
            kept = of_token.kept(recurs).bytes(width) + (0 if recurs else _NORMS * of_token.hidden * (FLOAT32_BYTES - width))
        else:
            # Of a fused MLP's last layer LoRA computes the input anew, and full training keeps it.
            mlp = (2 + share) * of_token.inner if self._fused_mlp else of_token.kept_by_mlp()
            kept = width * (of_token.kept_by_fused_attention(self._head_norms) + mlp)
            # Under autocast a float32 base has residuals, and queries and keys as they are rotated, of 32 bits.
            kept += (self.base_width - width) * (2 * of_token.hidden + of_token.queries + of_token.keys)
        if self._attends_by_products:  # which keeps its inputs as it cuts them out
            kept += self.base_width * (of_token.queries + of_token.keys) + width * of_token.values
        if self._keeps_scores and not recurs:
            kept += 3 * width * of_token.heads * (rows.prompt_ids.shape[1] + rows.completion_ids.shape[1])
        if share < 1:
            # The rows between A and B. PEFT's own layers keep their inputs as well, and more with DoRA or dropout.
            lora = self.settings.planning.lora
            own = 2 if lora.dropout or lora.use_dora else int(self.settings.quantization is not None)
            kept += width * (7 * lora.rank + own * (5 * of_token.hidden + of_token.inner))
        return kept

    def _kept_within_backward(self, sizes: ModelSizes | None) -> float:
        """Bytes of a token that the backward pass through a layer makes at a time."""
        of_token = self.sizes
        inner = of_token.inner + of_token.experts * of_token.expert_inner
        scanned = max(of_token.kept(recurs).wide for recurs in of_token.recurs)
        return self.width * (2 * of_token.hidden + (2 - _share_full(sizes)) * inner) + FLOAT32_BYTES * scanned

    @property
    def _converts_base(self) -> bool:
        """Whether autocast converts weights of the base, which it keeps for the backward pass."""
        return self.base_width > self.width

    @property
    def _attends_by_products(self) -> bool:
        """Whether a CPU attends by products and not by an operator, which takes numbers of one dtype.

        Rotary embeddings make float32 queries and keys of a float32 base.
        """
        return self.packs and self.settings.flags.on_cpu and (self._converts_base or not has_operators())

    def _converted(self, sizes: ModelSizes | None) -> float:
        """Bytes of the converted weights in layers; trained ones are float32."""
        if not self.settings.mixed_precision:
            return 0
        full, trained = (0, 0) if sizes is None else (sizes.full, sizes.trainable)
        return self.width * (trained + (self._linear - full if self._converts_base else 0))

    def _logits(self, predicted: int) -> float:
        """Bytes of the logits of so many tokens: of a block at a time, or without packing all together."""
        vocabulary, on_cpu = self.sizes.vocabulary, self.settings.flags.on_cpu
        if not self.packs:
            return predicted * vocabulary * (2 * self.width + 4 * FLOAT32_BYTES)
        most = Backend().most_logits(torch.device("cpu" if on_cpu else "cuda")) // vocabulary
        block = -(-predicted // -(-predicted // max(1, most)))  # blocks are of equal size
        weight = self.width * vocabulary * self.sizes.hidden if self._converts_base else 0
        if on_cpu and has_operators() and self._plain_projection and not self.settings.entropy_gradient:
            return weight + block * vocabulary * (FLOAT32_BYTES + self.width % FLOAT32_BYTES)  # an operator needs no copies
        return weight + 3 * block * vocabulary * FLOAT32_BYTES

    def _packed(self, sizes: ModelSizes | None) -> float:
        """Bytes of copies of weights while they do not change (see `engine/prepacked.py`, `Backend.projection`)."""
        on_cpu, width, lora = self.settings.flags.on_cpu, self.width, self.settings.planning.lora
        copied: float = 0
        if sizes is not None:
            plain = self._prepacks and not lora.use_dora and self.settings.quantization is None
            low_rank = sizes.trainable - sizes.full  # copied once as they are and once scaled
            if plain and (on_cpu or self._converts_base):
                copied += width * sizes.low_rank
            if plain:
                copied += low_rank * (width if not on_cpu else 2 * width if width < FLOAT32_BYTES else 0)
            copied += width * sizes.full if width < FLOAT32_BYTES else 0  # trained weights are float32
        output = self.sizes.vocabulary * self.sizes.hidden
        if self._converts_base:
            copied += width * output
        if on_cpu and packs(torch.float32) and self._plain_projection and (width == FLOAT32_BYTES or not has_operators()):
            copied += FLOAT32_BYTES * output
        return copied

    def _bounds(self, why_not_packed: str) -> list[str]:
        of_token, found = self.sizes, []
        if why_not_packed:
            found.append(f"passes repeat prompts and have the logits of all tokens, since {why_not_packed}")
        if any(of_token.recurs):
            found.append("recurrent layers keep what torch's own code for them does; a GPU's kernels for them keep less")
        if of_token.experts:
            found.append(f"a token keeps what the {of_token.experts} experts that it is sent to compute")
        if not self._fused and not all(of_token.recurs):
            found.append("layers that the engine does not fuse keep what transformers' own may keep at most")
        return found


def _share_full(sizes: ModelSizes | None) -> float:
    return 1.0 if sizes is None else sizes.share_full


def _why_not_packed(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Why the engine will not pack a model's sequences, as far as its config and weights tell; empty where it may."""
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    try:
        Engine(model).assume_packing(dtype)
    except UnsupportedAttentionError as error:
        return str(error)
    return ""

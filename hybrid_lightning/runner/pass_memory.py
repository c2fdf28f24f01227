"""`PassMemory`: peak bytes of a model's passes, training and sampling, in closed form.

`activations.py` has the bytes per token. This file multiplies them by the tokens of a pass, and adds the fixed costs: weights
that autocast converts, blocks of logits, copies of weights for decoding. The model is on the meta device.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.runner.activations import PassBytes, Rows, TokenSizes, Trained
from hybrid_lightning.runner.attention import UnsupportedAttentionError
from hybrid_lightning.runner.attention_hook import expected_windows, use_packing
from hybrid_lightning.runner.backend import Backend, packs
from hybrid_lightning.runner.cpu.build import library
from hybrid_lightning.runner.fused_layers import FusedMLP, FusedRMSNorm, use_fused_layers
from hybrid_lightning.runner.packing import MULTIPLE
from hybrid_lightning.runner.passes import plain_projection

# Upper bound of the hidden vectors that unfused norms keep in float32: Gemma's layers have four norms.
_NORMS = 14
_FLOAT = 4
_MULTIPROCESSORS = 132  # of an H100; FlashAttention derives its number of copies from them


class PassMemory:
    """Peak memory of a model's passes. The constructor fuses the model's layers.

    In the methods, `trained=None` means the base model during scoring: all its linear modules have gradients.

    Args:
        model: On the meta device, without an adapter.
        width: Bytes per number in products: 2 under autocast.
        on_cpu: Whether a CPU computes.
        recomputes: Whether gradient checkpointing is on.
        entropy_gradient: Whether entropies have a gradient.
        attention: The implementation of attention; None for transformers' choice.

    Attributes:
        sizes: Sizes of the model.
        bounds: Parts that are upper bounds rather than predictions, worded for the user.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        width: int,
        on_cpu: bool,
        recomputes: bool = False,
        entropy_gradient: bool = False,
        attention: str | None = None,
    ) -> None:
        self.sizes, self.width, self.on_cpu = TokenSizes(model.config), width, on_cpu
        self.recomputes, self.entropy_gradient = recomputes, entropy_gradient
        output = model.get_output_embeddings()
        layers = [part for part in model.modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not output]
        self._linear = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        self._prepacks = all(type(layer) is nn.Linear for layer in layers)
        self._base_width = next(model.parameters()).element_size()
        self._plain_projection = plain_projection(model) is not None
        self._head_norms = any(name.endswith(".q_norm") for name, _ in model.named_modules())
        eager = (attention or model.config._attn_implementation) == "eager"
        why_not_packed = _why_not_packed(model)
        self._packs, self._keeps_scores = not why_not_packed, bool(why_not_packed) and eager
        self._separate = not self._packs and not self.sizes.chunk  # each row with its own prompt, and the logits of all tokens
        self._copies = not (self._packs or self._separate or recomputes)  # caches of prompts (see `padded.py`)
        use_fused_layers(model, Backend())
        kinds = {type(module) for module in model.modules()}
        self._fused, self._fused_mlp = FusedRMSNorm in kinds, FusedMLP in kinds
        self.bounds = self._bounds(why_not_packed)

    def training(self, rows: Rows, trained: Trained | None, compared: int = 0) -> PassBytes:
        """A forward and backward pass over these rows, with `compared` blocks of logits for a divergence from a teacher."""
        sizes, width, predicted = self.sizes, self.width, rows.completions * rows.completion_tokens
        tokens, every = self._tokens(rows), rows.prompt_tokens + rows.completion_tokens
        layers = [self._tokens(rows, recurs) * self.kept(recurs, every, trained) for recurs in sizes.recurs]
        converted, logits = self._converted(trained), self._logits(predicted, compared)
        within = self._within_backward(rows, tokens, 1.0 if trained is None else trained.share_full)
        # The states before and after the last norm, and the gradients of the predicting states, which come with the logits.
        kept: float = width * sizes.hidden * (2 * tokens + predicted * (1 + self.entropy_gradient))
        adapted, of_layer = (0, 0) if trained is None else (trained.experts, trained.experts_in_layer)
        within += self._base_width * of_layer * (2 if self.recomputes else 1)  # experts' gradients, and their adapted weights
        kept += 0 if self.recomputes else self._base_width * adapted
        if self.recomputes:
            kept += len(layers) * tokens * self._base_width * sizes.hidden
            within += max(layers) + converted / len(layers)
        else:
            kept += sum(layers) + converted + (self._copied(rows) if self._copies else 0)
        recomputed = 0 if self._plain_projection and not self._separate else logits  # recomputed in the backward pass
        return PassBytes(kept, logits, backward=kept + within + recomputed)

    def sampling(self, rows: Rows, trained: Trained | None, held_logits: int = 1) -> PassBytes:
        """Sampling full-length completions of all rows together, with `held_logits` times their logits to choose a token.

        The peak is reached when the prompts are read, or at the last token.
        """
        sizes, width, every = self.sizes, self.width, rows.prompt_tokens + rows.completion_tokens
        asked = rows.prompts * rows.prompt_tokens
        token = sizes.attending * ((_FLOAT if self._attends_by_products else width) * sizes.keys + width * sizes.values)
        places = asked + rows.completions * rows.completion_tokens if self._packs else rows.completions * every
        cache = token * places + rows.completions * sum(sizes.recurs) * sizes.states.bytes(width)
        # A layer keeps nothing. At any time it holds half of what it would keep for a backward pass.
        within = max(sizes.kept(recurs).bytes(width) for recurs in sizes.recurs) / 2
        adapted = 0 if trained is None else self._base_width * trained.experts_in_layer
        logits = held_logits * _FLOAT * rows.completions * sizes.vocabulary
        repeats = not self._packs or (not self.on_cpu and width == _FLOAT)  # whether keys are repeated for all heads
        step = rows.completions * (within + repeats * 2 * width * every * sizes.queries)
        reading = asked * (token + within)
        return PassBytes(max(step, reading - cache - logits) + adapted, logits, cache=cache, packed=self._packed(trained))

    def kept(self, recurs: bool, length: int, trained: Trained | None) -> float:
        """Bytes that a token keeps in a layer for the backward pass, in a sequence of this length."""
        sizes, width = self.sizes, self.width
        if recurs or not self._fused:
            kept = sizes.kept(recurs).bytes(width) + (0 if recurs else _NORMS * sizes.hidden * (_FLOAT - width))
        else:
            # The input of a fused MLP's last layer: LoRA recomputes it, full training keeps it.
            share = 1.0 if trained is None else trained.share_full
            mlp = (2 + share) * sizes.inner + sizes.kept_by_experts() if self._fused_mlp else sizes.kept_by_mlp()
            kept = width * (sizes.kept_by_fused_attention(self._head_norms) + mlp)
            # Under autocast a float32 base has 32-bit residuals, and 32-bit queries and keys after rotation.
            kept += (self._base_width - width) * (2 * sizes.hidden + sizes.queries + sizes.keys)
        if self._attends_by_products:  # keeps its inputs as cut out
            kept += self._base_width * (sizes.queries + sizes.keys) + width * sizes.values
        if not self.on_cpu and not recurs:
            kept += _FLOAT * sizes.heads  # the log-sum-exps of FlashAttention
        if self._keeps_scores and not recurs:
            kept += 3 * width * sizes.heads * length
        if trained is not None and trained.low_rank:
            kept += width * (7 * trained.rank + trained.inputs * (5 * sizes.hidden + sizes.inner))
        return kept

    def _tokens(self, rows: Rows, recurs: bool = False) -> int:
        """Tokens that a layer computes: in a packed pass each prompt once, and no completion's last token."""
        length, chunk = rows.completion_tokens - 1, self.sizes.chunk if recurs else 1
        if self._packs:
            tokens = rows.prompts * rows.prompt_tokens + rows.completions * length
            return tokens + -tokens % MULTIPLE
        if self._separate:
            return rows.completions * (rows.prompt_tokens + rows.completion_tokens)
        runs = [(rows.prompts, rows.prompt_tokens), (rows.completions, length)]
        if not self._copies:
            runs = [(rows.completions, rows.prompt_tokens + length)]
        return sum(count * -(-tokens // chunk) * chunk for count, tokens in runs)

    def _copied(self, rows: Rows) -> float:
        """Bytes of the copies of the prompts' cache."""
        sizes = self.sizes
        keys = sizes.cached + 2 * sizes.attending * sizes.queries  # some implementations repeat keys and values for all heads
        return rows.completions * (self.width * rows.prompt_tokens * keys + sum(sizes.recurs) * sizes.states.bytes(self.width))

    def _within_backward(self, rows: Rows, tokens: int, share_full: float) -> float:
        """Largest temporary bytes of the backward pass through a layer: in its MLP, or later in its attention."""
        sizes, width = self.sizes, self.width
        inner = sizes.inner + sizes.experts * sizes.expert_inner
        scanned = max(sizes.kept(recurs).wide for recurs in sizes.recurs)
        in_mlp = tokens * (width * (2 * sizes.hidden + (2 - share_full) * inner) + _FLOAT * scanned)
        if self.on_cpu:
            return in_mlp
        freed = 2 * sizes.inner * self._fused_mlp  # kept by the MLP until now
        in_attention = tokens * (width * (2 * sizes.hidden + sizes.queries - freed) + _FLOAT * scanned)
        return max(in_mlp, in_attention + self._workspace(rows))

    def _workspace(self, rows: Rows) -> float:
        """Workspace of FlashAttention's backward pass in bytes, in the largest of a layer's calls.

        It adds up gradients of queries in float32, in several copies if the order is fixed, plus one number per head and token.
        It holds gradients of keys and values for all heads. Each segment is padded by 128 tokens.
        """
        sizes, asked, made = self.sizes, rows.prompts * rows.prompt_tokens, rows.completions * (rows.completion_tokens - 1)
        calls = [(rows.prompts, asked, asked), (rows.prompts, made, asked), (rows.completions, made, made)]
        if not self._packs:
            every = rows.completions * (rows.prompt_tokens + rows.completion_tokens)
            calls = [(rows.completions, every, every)]
        found = []
        for segments, queries, keys in calls:
            copies = -(-_MULTIPROCESSORS // max(1, segments * sizes.heads)) if self._packs else 1
            sums = (queries + 128 * segments) * (copies * sizes.queries + sizes.heads)
            found.append(_FLOAT * sums + self.width * 2 * keys * sizes.queries * (sizes.keys < sizes.queries))
        return max(found)

    @property
    def _converts_base(self) -> bool:
        """Whether autocast converts weights of the base model and keeps the copies for the backward pass."""
        return self._base_width > self.width

    @property
    def _attends_by_products(self) -> bool:
        """Whether a CPU attends by products instead of an operator, which needs one dtype for all inputs.

        With a float32 base, rotary embeddings make queries and keys float32.
        """
        return self._packs and self.on_cpu and (self._converts_base or library() is None)

    def _converted(self, trained: Trained | None) -> float:
        """Bytes of the layers' weights that autocast converts: trained weights are float32."""
        if self.width == _FLOAT:
            return 0
        full, lora = (0, 0) if trained is None else (trained.full, trained.lora)
        return self.width * (full + lora + (self._linear - full if self._converts_base else 0))

    def _logits(self, predicted: int, compared: int = 0) -> float:
        """Bytes of the logits of this many tokens: one block at a time, or all together."""
        vocabulary = self.sizes.vocabulary
        if self._separate:
            return predicted * vocabulary * (2 * self.width + 4 * _FLOAT)
        most = Backend().most_logits(torch.device("cpu" if self.on_cpu else "cuda")) // vocabulary // (4 if compared else 1)
        block = -(-predicted // -(-predicted // max(1, most)))  # blocks are of equal size
        weight = self.width * vocabulary * self.sizes.hidden if self._converts_base else 0
        if compared:
            return weight + compared * block * vocabulary * _FLOAT
        if self.on_cpu and library() is not None and self._plain_projection and not self.entropy_gradient:
            return weight + block * vocabulary * (_FLOAT + self.width % _FLOAT)  # an operator needs no copies
        return weight + 3 * block * vocabulary * _FLOAT

    def _packed(self, trained: Trained | None) -> float:
        """Bytes of the copies of weights for decoding (see `prepacked.py` and `Backend.projection`)."""
        narrow, output = self.width < _FLOAT, self.sizes.vocabulary * self.sizes.hidden
        copied = self.width * output if self._converts_base else 0
        if self.on_cpu and packs(torch.float32) and self._plain_projection and not (narrow and library() is not None):
            copied += _FLOAT * output
        if trained is None:
            return copied
        copied += self.width * trained.full if narrow else 0
        if trained.prepacks and self._prepacks:
            copied += self.width * trained.low_rank if self.on_cpu or self._converts_base else 0
            # A CPU has A and B in float32, or merged; other devices have them in the dtype of products.
            copied += trained.lora * (self.width if not self.on_cpu else _FLOAT if narrow else 0)
        return copied

    def _bounds(self, why_not_packed: str) -> tuple[str, ...]:
        sizes, found = self.sizes, []
        if why_not_packed:
            passes = "sequences are padded" if self._copies else "passes repeat prompts"
            found.append(f"{passes}{' and keep the logits of all tokens' * self._separate}, since {why_not_packed}")
        if any(sizes.recurs):
            found.append("recurrent layers are counted as in torch's own code; a GPU's kernels for them keep less")
        if sizes.experts:
            found.append(f"a token is counted with the activations of the {sizes.experts} experts it is routed to")
        if not self._fused and not all(sizes.recurs):
            found.append("layers that the runner does not fuse are counted with the most that transformers' layers keep")
        return tuple(found)


def _why_not_packed(model: PreTrainedModel) -> str:
    """Why the runner will not pack a model's sequences, judging by its config and weights; empty where it may."""
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    try:
        expected_windows(model.config.get_text_config())
        use_packing(model)
    except UnsupportedAttentionError as error:
        return str(error)
    return ""

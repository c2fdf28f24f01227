"""What a causal language model computes for each token, in numbers: one closed form, from the sizes in the model's config.

The engine chooses by it how many tokens a pass takes, and `memory/` plans a run by it before anything is loaded. For the backward
pass a token keeps in a layer

    as transformers computes it      16 hidden + 5 inner
    with fused layers                4 hidden + 2 queries + keys + values + 2 inner

numbers, where queries, keys and values are those of all heads (with LoRA on all linear modules of Llama: 1.0 MB a token of
SmolLM2-135M, 0.46 MB with fused layers). A layer with experts keeps, in place of 5 inner, two hidden vectors and 5 inner for each
expert that a token is sent to. Recurrent layers keep what torch's own code for them does, most of it in float32: the kernels that
a GPU may have for them keep less, so for these layers the form is an upper bound. Tests compare it with what small models of many
families hold.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

# Bytes to spend on activations. On a CPU 650 tokens at a time are as fast as 2,600 (SmolLM2-135M). On an accelerator a pass takes
# this share of what is left beside weights, gradients and optimizer; the rest is for logits, for a layer's whole weights where
# they are sharded, and for what lies between tensors.
_ON_CPU = 0.68e9
_OF_THE_REST, _USABLE = 0.5, 0.9
_ON_ACCELERATOR = 8e9  # where its memory is not known
_STATE = 12  # bytes of a trained weight beside itself: its gradient, and two moments in float32
_WIDTH = 2  # bytes of a number: activations have 16 bits under autocast; models in float32 are small
_FLOAT = 4
_LEAST = 256  # tokens

RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "hybrid"}  # layers, as configs call them; others attend
_BOTH = "hybrid"  # beside attention in the same layer
_LINEAR_SIZES = ("linear_key_head_dim", "linear_value_head_dim")
_CHUNK = 64  # tokens of a sequence that linear attention computes together


@dataclass(frozen=True)
class Numbers:
    """So many numbers in the dtype of the pass, and so many in float32 whatever that dtype is."""

    narrow: float = 0.0
    wide: float = 0.0

    def bytes(self, width: int) -> float:
        """Bytes, where a number of the pass has `width` of them."""
        return width * self.narrow + _FLOAT * self.wide


class TokenSizes:
    """Sizes of a causal language model, from its config alone.

    Attributes:
        hidden: Numbers of a hidden state.
        inner: Numbers between the two products of a feed-forward layer, or of the experts that all tokens share.
        experts: Experts that a token is sent to.
        expert_inner: `inner` of each.
        heads: Heads of attention; 0 where no layer attends.
        queries, keys, values: Numbers of all heads together.
        recurs: Of each layer whether it is recurrent.
        attending: Number of the layers that attend.
        states: What a recurrent layer keeps of a sequence, whatever its length, to decode the next token.
        chunk: Tokens that a recurrent layer computes together; it pads a sequence to a multiple of them.
            0 if it can continue from a state with one token alone.
    """

    def __init__(self, config: Any) -> None:
        config = _of_widest_layers(config.get_text_config())
        self.hidden: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        self.heads = _size(config, "num_attention_heads", otherwise=0)
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
        kinds = kinds or ["attention" if self.heads else "recurrent"] * config.num_hidden_layers
        self.recurs = [kind in RECURRENT for kind in kinds]
        self.attending = sum(kind not in RECURRENT or kind == _BOTH for kind in kinds) if self.heads else 0
        self.queries, self.keys, self.values = _attention(config, self.heads)
        self.inner, self.experts, self.expert_inner = _feed_forward(config)
        nothing = Numbers(), Numbers(), 1
        self._recurrent, self.states, self.chunk = _recurrence(config, self.heads) if any(self.recurs) else nothing

    @property
    def cached(self) -> int:
        """Keys and values of a token in all layers, in numbers."""
        return (self.keys + self.values) * self.attending

    def kept(self, recurs: bool) -> Numbers:
        """What a token keeps in a layer for the backward pass, as transformers computes the layer."""
        numbers = 16 * self.hidden + self.kept_by_mlp()
        return Numbers(numbers + self._recurrent.narrow, self._recurrent.wide) if recurs else Numbers(numbers)

    def kept_by_mlp(self) -> int:
        """The part of a feed-forward layer and of experts in that."""
        return 5 * self.inner + self.kept_by_experts()

    def kept_by_experts(self) -> int:
        """The part of the experts that a token is sent to."""
        return self.experts * (2 * self.hidden + 5 * self.expert_inner)

    def kept_by_fused_attention(self, head_norms: bool = False) -> int:
        """What a token keeps in an attending layer with fused norms, but for its feed-forward layer.

        With `head_norms`, norms of the heads keep queries and keys once more.
        """
        return 4 * self.hidden + 2 * self.queries + self.keys + self.values + head_norms * (self.queries + self.keys)


@dataclass(frozen=True)
class Trained:
    """What an adapter trains, in float32; numbers of parameters."""

    full: int  # of the linear modules that are trained fully
    low_rank: int  # of the linear modules that have LoRA
    lora: int  # of LoRA's A and B
    share_full: float  # of what can be trained
    rank: int  # of LoRA
    inputs: int = 0  # how often LoRA's layers keep their inputs: the engine's keep them once for all with the same input
    prepacks: bool = True  # whether the engine copies weights of LoRA's layers for decoding
    experts: int = 0  # of the experts that have LoRA, for which PEFT computes the adapted weights in each pass
    experts_in_layer: int = 0  # of one layer


@dataclass(frozen=True)
class Rows:
    """So many prompts and completions of them all, of these lengths."""

    prompts: int
    completions: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class PassBytes:
    """Bytes that a pass holds at its peak."""

    activations: float
    logits: float
    backward: float = 0.0  # everything that the backward pass holds at its peak
    cache: float = 0.0  # keys and values, or recurrent states
    packed: float = 0.0  # copies of weights in the order or dtype in which products read them


def tokens_of_pass(config: Any, recomputes: bool, on_cpu: bool, rest: float | None = None) -> int:
    """Tokens of a pass for a model with this config: at least 256, and more the smaller it is, and the more memory there is.

    With gradient checkpointing it recomputes. `rest` are an accelerator's `activation_bytes`; None where its memory is not known.
    """
    sizes = TokenSizes(config)
    layers = [sizes.kept(recurs).bytes(_WIDTH) for recurs in sizes.recurs]
    needed = len(layers) * sizes.hidden * _WIDTH + max(layers) if recomputes else sum(layers)
    accelerator = _ON_ACCELERATOR if rest is None else rest
    return max(_LEAST, int((_ON_CPU if on_cpu else accelerator) / needed))


def activation_bytes(total: int, weights: float, trained: float) -> float:
    """Bytes that a pass may spend on activations on an accelerator with `total` bytes.

    There lie so many bytes of weights, of which so many weights are trained.
    """
    return _OF_THE_REST * max(0.0, _USABLE * total - weights - _STATE * trained)


def _of_widest_layers(config: Any) -> Any:
    """A config in which sizes that layers have of their own, as in Gemma 4, are the largest of any layer."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layers = list(config.per_layer_config)
    widest = copy(layers[0])
    for name, value in vars(layers[0]).items():
        if type(value) is int:
            setattr(widest, name, max(getattr(layer, name) for layer in layers))
    return widest


def _attention(config: Any, heads: int) -> tuple[int, int, int]:
    """Numbers of queries, keys and values."""
    if not heads:
        return 0, 0, 0
    if getattr(config, "kv_lora_rank", None):  # latent attention, whose keys and values are cached for all heads
        keys = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return keys, keys, heads * config.v_head_dim
    size = _size(config, "head_dim", otherwise=config.hidden_size // heads)
    groups = _size(config, "num_key_value_heads", otherwise=heads)
    return heads * size, groups * size, groups * size


def _feed_forward(config: Any) -> tuple[int, int, int]:
    """`inner`, `experts` and `expert_inner` of `TokenSizes`."""
    inner = _size(config, "intermediate_size", "n_inner", otherwise=4 * config.hidden_size)
    count = _size(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", otherwise=0)
    if not count:
        return inner, 0, 0
    each = _size(config, "moe_intermediate_size", otherwise=inner)
    shared = _size(config, "n_shared_experts", otherwise=0) * each
    sent = _size(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", otherwise=count)
    if config.model_type == "llama4_text":  # whose layers compute all experts for each token, and multiply most results by 0
        sent = count
    return _size(config, "shared_expert_intermediate_size", otherwise=shared), sent, each


def _recurrence(config: Any, heads: int) -> tuple[Numbers, Numbers, int]:
    """What a recurrent layer keeps of a token beside what all layers keep, and of a sequence, and `TokenSizes.chunk`."""
    hidden = config.hidden_size
    state = _size(config, "state_size", "mamba_d_state", "ssm_state_size", otherwise=0)
    if not state:  # linear attention by the gated delta rule, or something that is taken to be no larger
        heads = _size(config, "linear_num_value_heads", otherwise=heads or 16)
        key, value = (_size(config, name, "head_dim", otherwise=hidden // heads) for name in _LINEAR_SIZES)
        convolved = 2 * _size(config, "linear_num_key_heads", otherwise=heads) * key + heads * value
        wide = heads * (8 * key + 6 * value + 4 * _CHUNK + 3 * key * value / _CHUNK)
        return Numbers(4 * convolved, wide), Numbers(4 * convolved, heads * key * value), _CHUNK
    inner = _size(config, "expand", "mamba_expand", otherwise=2) * hidden
    states = Numbers(4 * (inner + 2 * state), inner * state)
    heads = _size(config, "num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", otherwise=0)
    if heads:  # Mamba 2, which computes a chunk of a sequence as attention does
        chunk = _size(config, "chunk_size", "mamba_chunk_size", otherwise=256)
        return Numbers(0, 12 * heads * chunk + 8 * inner), states, chunk
    return Numbers(0, 4 * inner * state + 8 * inner), states, 0  # Mamba, which keeps the state after each token


def _size(config: Any, *names: str, otherwise: int) -> int:
    """The first of some sizes that a config has, which families call differently; the largest where layers differ."""
    found = next((value for name in names if (value := getattr(config, name, None))), otherwise)
    return int(max(found) if isinstance(found, (list, tuple)) else found)

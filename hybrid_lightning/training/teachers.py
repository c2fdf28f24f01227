"""Teachers: models that give probabilities of the tokens that the policy sampled.

    show        a rollout's completions after the prompts that the teacher sees
    logprobs    log-probabilities of these tokens, once per rollout: for `SampledReverseKL`
    predict     whole distributions, in each training step: for `ReverseKL`, `ForwardKL`, `JensenShannon`

`student` is the `Passes` of the policy. Axes: B sequences, T completion tokens, K sampled tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import Distillation
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization, quantize_base
from hybrid_lightning.rollout.batching import pad_left, pad_token
from hybrid_lightning.rollout.rollout_engine import model_context
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.runner import Predictions, predictions
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.training.generation import Generation, OwnGeneration
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Prompt, Rollout, Sequences

Interruptible = Callable[[], AbstractContextManager[Any]]


class Teacher(Configurable, ABC):
    """Base class of teachers. A subclass overrides `passes` or `context`; a remote teacher overrides `logprobs`."""

    pretrained: Pretrained | None = None  # the teacher's own model in this process, if it has one
    too_long = ""  # remedy if prompts are too long only for the teacher; empty for the usual remedies
    needs_start_policy = False  # whether the policy's start weights must be kept
    is_remote = False  # whether it computes elsewhere, which can fail on a single rank

    @abstractmethod
    def check(self, student: Passes, distillation: Distillation) -> None:
        """Raise ConfigError if it cannot teach this policy with this `distillation`. Called before and after loading weights."""

    def check_prompts(self, generation: Generation, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if a prompt as the teacher sees it, with its longest completion, exceeds the teacher's context."""
        limit, _ = model_context((self.pretrained or generation.policy.pretrained).config)
        seen, name = [self.with_context(prompt) for prompt in prompts], f"the teacher's {limit} positions"
        generation.check_lengths(seen, limit, name, " for the teacher", self.too_long)

    def show(
        self,
        student: Passes,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        sequences: Sequences,
        encode: Callable[[int, Prompt], list[int]],
    ) -> Sequences:
        """The B rows after the prompts that the teacher sees; by default unchanged.

        `numbers` are the rows' places in `prompts`. `encode(number, prompt)` tokenizes a prompt that replaces prompt `number`,
        with the environment's first messages.
        """
        return sequences

    def listen(self, prompt_ids: Sequence[Sequence[int]], samples: int) -> Callable[[int, Sequence[int]], object] | None:
        """A function for the row and tokens of each completion that ends early (see `SamplingRequest.on_tokens`), or None."""
        return None

    def passes(self, student: Passes) -> Passes:
        """The teacher's passes on the student's device; by default the policy's."""
        return student

    def context(self, student: Passes) -> AbstractContextManager[Any]:
        """Context in which `passes` computes as the teacher."""
        return nullcontext()

    def logprobs(self, student: Passes, sequences: Sequences, interruptible: Interruptible = nullcontext) -> Tensor:
        """Log-probabilities of the sampled tokens without gradient, [B, T] float32. All ranks must call this together."""
        passes = self.passes(student)
        with self.context(student):
            logprobs = passes.measure([sequences], interruptible=interruptible)[0][0]
        assert logprobs is not None
        return logprobs

    def predict(self, student: Passes, sequences: Sequences) -> Predictions:
        """Predictions of the K sampled tokens of a chunk of a micro-batch, without gradient."""
        policy = self.passes(student).policy
        with self.context(student), policy.inference():
            states, logits = predictions(policy.runner, sequences)

        def within(some: Tensor) -> Tensor:
            with self.context(student), policy.inference():
                return logits(some)

        return states, within

    def with_context(self, prompt: Prompt) -> Prompt:
        """The prompt as the teacher sees it."""
        return prompt

    def complete(self, student: Generation, passes: Passes, prompts: Sequence[Prompt]) -> Rollout:
        """A completion of each prompt by a teacher in this process, before training."""
        given, policy = vars(student.sampler), self.passes(passes).policy
        sampler = Sampler(**{name: given[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "min_p")})
        generation = OwnGeneration(policy, sampler, student.reward, Run(), episodes=student.episodes)
        draws = torch.Generator(policy.device).manual_seed(0)
        return generation.generate([self.with_context(prompt) for prompt in prompts], draws=draws)

    def release(self) -> None:
        """Free memory on the device for sampling."""

    def held_bytes(self, student: Passes) -> int:
        """Bytes of the teacher's own weights on the student's device during an update; by default 0."""
        return 0


class ModelTeacher(Teacher):
    """A second model with the policy's tokenizer, which reads the policy's prompts.

    Each device holds all of its weights; unless quantized, they move to host memory while completions are made.

    Args:
        model: A folder, a GGUF file, `package:NAME/FILE`, or a hub id, as in `model.model`.
        revision: Branch, tag or commit of a hub model.
        dtype: Dtype of its weights; None for the policy's dtype.
        quantization: Quantizes its linear modules, such as `NF4()`; None for no quantization.

    Raises:
        ModelError: If the model cannot be found.
    """

    def __init__(
        self, model: str, revision: str | None = None, dtype: str | None = None, quantization: Quantization | None = None
    ) -> None:
        self.quantization, self.dtype = quantization, dtype
        self.pretrained: Pretrained = Pretrained(model, revision, dtype or "float32")
        self._passes: Passes | None = None
        self._on_host: list[tuple[Tensor, Tensor]] = []  # weights that are on the device, and their values on the host

    def check(self, student: Passes, distillation: Distillation) -> None:
        """See `Teacher`; ConfigError if a token has different ids in the two tokenizers."""
        ours, theirs = student.policy.pretrained.tokenizer.get_vocab(), self.pretrained.tokenizer.get_vocab()
        unlike = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
        if unlike:
            first = min(unlike, key=lambda token: (ours.get(token, math.inf), theirs.get(token, math.inf)))
            raise ConfigError(
                f"the teacher's tokenizer differs from the policy's: {len(unlike)} tokens differ, first {first!r}, with id "
                f"{ours.get(first)} for the policy and {theirs.get(first)} for the teacher; use a teacher with the same tokenizer"
            )
        self.pretrained.check()

    def passes(self, student: Passes) -> Passes:
        """See `Teacher`. The first call loads the model."""
        device = student.policy.device
        if self._passes is None:
            policy = Policy(self.pretrained.reading_as(student.policy.pretrained, self.dtype))
            if self.quantization is not None:
                quantize_base(policy.model, self.quantization, (), device)
            self._passes = Passes(policy, student.temperature)
        model = self._passes.policy.model
        if device.type != "cpu" and next(model.parameters()).device != device:
            if self.quantization is None:
                self._on_host = [(weight, weight.data) for weight in model.parameters()]
            model.to(device)
        return self._passes

    def held_bytes(self, student: Passes) -> int:
        """See `Teacher`."""
        if self._passes is None:
            self.passes(student)
            self.release()
        assert self._passes is not None
        return sum(weight.numel() * weight.element_size() for weight in self._passes.policy.model.parameters())

    def release(self) -> None:
        """See `Teacher`. The teacher's weights do not change, so nothing is copied back to the host."""
        for weight, data in self._on_host:
            weight.data = data
        self._on_host = []


class SelfTeacher(Teacher):
    """The policy itself, with its start or current weights, and with privileged context in its prompt (SDFT, SDPO).

    Args:
        context: Template that replaces the prompt or, in a chat, the user's last message: `{prompt}` is its text, `{answer}` the
            reference answer, and other names are columns of the row. None keeps the prompt: the start policy then keeps the
            policy close to itself.
        start: Whether the start policy teaches (the adapter switched off). If false, the current policy teaches, which needs a
            context.

    Raises:
        ConfigError: If the template is malformed, or the current policy would teach itself without a context.
    """

    too_long = "shorten model.teacher.context or the columns that it shows"

    def __init__(self, context: str | None = None, start: bool = True) -> None:
        if context is not None and "prompt" not in template_fields("context", context):
            raise ConfigError(f"SelfTeacher: context={context!r} does not have {{prompt}}; put it where the prompt should be")
        if context is None and not start:
            raise ConfigError("SelfTeacher: with start=false and no context, the policy would learn from itself; set context")
        self.template, self.start, self.needs_start_policy = context, start, start

    def check(self, student: Passes, distillation: Distillation) -> None:
        """See `Teacher`."""
        if distillation.of_distributions and student.policy.weights.sharded:
            raise ConfigError(
                f"SelfTeacher with {type(distillation).__name__} does not work with weights that FSDP2 splits over devices; set "
                "model.distillation=SampledReverseKL, or trainer.strategy=ddp"
            )

    def show(
        self,
        student: Passes,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        sequences: Sequences,
        encode: Callable[[int, Prompt], list[int]],
    ) -> Sequences:
        """See `Teacher`; ConfigError if the row does not have a column of the template."""
        if self.template is None:
            return sequences
        encoded = [encode(number, self.with_context(prompt)) for number, prompt in enumerate(prompts)]
        pad_id, device = pad_token(student.policy.pretrained.tokenizer), sequences.prompt_ids.device
        prompt_ids, prompt_mask = pad_left([encoded[number] for number in numbers], pad_id, device)
        return replace(sequences, prompt_ids=prompt_ids, prompt_mask=prompt_mask)

    def with_context(self, prompt: Prompt) -> Prompt:
        """See `Teacher`; override it to give other context."""

        def fill(text: str | None) -> str:
            values = {**prompt.columns, "answer": prompt.answer, "prompt": text}
            return fill_template("context", self.template or "{prompt}", values, prompt.place)

        if prompt.messages is None:
            return replace(prompt, text=fill(prompt.text))
        messages = [dict(message) for message in prompt.messages]
        asked = next(message for message in reversed(messages) if message["role"] == "user")
        asked["content"] = fill(asked["content"])
        return replace(prompt, messages=tuple(messages))

    def context(self, student: Passes) -> AbstractContextManager[Any]:
        """See `Teacher`."""
        return student.policy.start_policy() if self.start else nullcontext()

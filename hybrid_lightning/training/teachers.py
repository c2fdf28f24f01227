"""Teachers: what says how probable the tokens are that the policy sampled.

    check       tokenizers, context and options, before a run
    seen        a rollout's completions after the prompts that the teacher sees
    logprobs    of these tokens, when the rollout is made: for `SampledReverseKL`
    predict     whole distributions, in each training step: for `ReverseKL`, `ForwardKL`, `JensenShannon`

Axes: B sequences, T completion tokens, K tokens that were sampled.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.engine import Predictions, predictions
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import Distillation
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization, quantize_base
from hybrid_lightning.rollout.batching import pad_left, pad_token
from hybrid_lightning.rollout.rollout_engine import model_context
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Prompt, Rollouts, Sequences

Interruptible = Callable[[], AbstractContextManager[Any]]


class Teacher(Configurable):
    """Base class of teachers. What they compute with the policy is handed to them as `student`, its passes."""

    gives_distributions = True  # whether there is more than the log-probability of the sampled tokens
    needs_start_policy = False  # whether the policy's start weights must be kept
    is_remote = False  # whether it computes elsewhere, which can fail on one rank alone

    def check(self, student: Passes, distillation: Distillation) -> None:
        """Raise ConfigError if it cannot teach this policy so; ModelError if there is no such model.

        Called before weights are loaded, and again when they are.
        """
        if distillation.of_distributions and not self.gives_distributions:
            raise ConfigError(
                f"{type(self).__name__} gives log-probabilities of sampled tokens alone, and {type(distillation).__name__} "
                "compares whole distributions; set model.distillation=SampledReverseKL, or take ModelTeacher"
            )

    def seen(
        self, student: Passes, prompts: Sequence[Prompt], sequences: Sequences, encode: Callable[[Prompt], list[int]]
    ) -> Sequences:
        """Completions after the prompts that the teacher sees: by default what the policy saw.

        Args:
            student: The policy's passes.
            prompts: P prompts.
            sequences: B = P * G completions of them.
            encode: Tokenizes a prompt as the policy's are.
        """
        return sequences

    def listen(self, prompt_ids: Sequence[Sequence[int]], samples_per_prompt: int) -> Callable[[int, Sequence[int]], None] | None:
        """What gets the number and the tokens of each completion of a rollout that has ended before others; None for nothing."""
        return None

    @abstractmethod
    def logprobs(self, student: Passes, sequences: Sequences, interruptible: Interruptible = nullcontext) -> Tensor:
        """Log-probabilities of the sampled tokens without gradient, [B, T] float32 on the student's device.

        All ranks call it together. A signal may end it within `interruptible`.
        """

    def predict(self, student: Passes, sequences: Sequences) -> Predictions:
        """What predicts the K sampled tokens, without gradient, of a chunk of a micro-batch."""
        raise NotImplementedError

    def complete(self, student: Generation, passes: Passes, prompts: Sequence[Prompt]) -> Rollouts | None:
        """A completion of each prompt by the teacher, for the doctor; None if it cannot complete."""
        return None

    def release(self) -> None:
        """Free the device, since completions are made next."""


class LocalTeacher(Teacher):
    """Base class of teachers whose passes are made in this process."""

    @abstractmethod
    def passes(self, student: Passes) -> Passes:
        """The passes of the teacher, on the student's device."""

    def context(self, student: Passes) -> AbstractContextManager[Any]:
        """Within this context these passes are the teacher's."""
        return nullcontext()

    def logprobs(self, student: Passes, sequences: Sequences, interruptible: Interruptible = nullcontext) -> Tensor:
        """See `Teacher`."""
        passes = self.passes(student)
        with self.context(student):
            ((logprobs, _, _),) = passes.measure([sequences], interruptible=interruptible)
        assert logprobs is not None
        return logprobs

    def predict(self, student: Passes, sequences: Sequences) -> Predictions:
        """See `Teacher`."""
        policy = self.passes(student).policy
        with self.context(student), policy.inference():
            found = predictions(policy.engine, sequences)

        def logits(states: Tensor) -> Tensor:
            with self.context(student), policy.inference():
                return found.logits(states)

        return Predictions(found.states, logits)


class ModelTeacher(LocalTeacher):
    """A second model with the tokenizer of the policy.

    It has the policy's prompts, and computes with whole weights on each device. While completions are made its weights are in the
    memory of the host, unless they are quantized.

    Args:
        model: As `model.model`: a folder, a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Dtype of its weights; None takes the policy's.
        quantization: Quantizes its linear modules, such as `NF4()`; None keeps them as they are.
        max_tokens: Most tokens of one of its passes over a rollout; None chooses by its sizes. Of whole distributions its passes
            are those of the update (`model.max_tokens_per_micro_batch`).

    Raises:
        ModelError: If there is no such model.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.quantization, self.max_tokens, self._dtype = quantization, max_tokens, dtype
        self.pretrained = Pretrained(model, revision, dtype or "float32", None, None, None)
        self._passes: Passes | None = None
        self._on_host: list[tuple[Tensor, Tensor]] = []  # weights of the device, and what they are on the host

    def check(self, student: Passes, distillation: Distillation) -> None:
        """See `Teacher`: of models with the same tokenizer alone."""
        super().check(student, distillation)
        self.pretrained.dtype = self._dtype or student.policy.pretrained.dtype
        check_tokenizers(student.policy.pretrained.tokenizer, self.pretrained.tokenizer)
        self.pretrained.check()

    def dtype_for(self, policy: torch.dtype) -> torch.dtype:
        """Dtype of its weights beside a policy of this one."""
        return policy if self._dtype is None else DTYPES[self._dtype]

    def passes(self, student: Passes) -> Passes:
        """See `LocalTeacher`. The first call loads the model."""
        device = student.policy.device
        if self._passes is None:
            self.pretrained.dtype = self._dtype or student.policy.pretrained.dtype
            self.pretrained.encoder = student.policy.pretrained.encoder  # it completes the policy's prompts
            policy = Policy(self.pretrained)
            if self.quantization is not None:
                quantize_base(policy.model, self.quantization, (), device)
            self._passes = Passes(policy, student.temperature, self.max_tokens)
        model = self._passes.policy.model
        if device.type != "cpu" and next(model.parameters()).device != device:
            if self.quantization is None:
                self._on_host = [(part, part.data) for part in model.parameters()]
            model.to(device)
        return self._passes

    def complete(self, student: Generation, passes: Passes, prompts: Sequence[Prompt]) -> Rollouts | None:
        """See `Teacher`."""
        asked, policy = vars(student.sampler), self.passes(passes).policy
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "min_p")
        sampler = Sampler(**{name: asked[name] for name in names})
        generation = Generation(policy, sampler, student.reward, Run(), episodes=student.episodes)
        return generation.generate(prompts, draws=torch.Generator(policy.device).manual_seed(0))

    def release(self) -> None:
        """See `Teacher`: its weights do not change, so that what the host has is what they are."""
        for part, data in self._on_host:
            part.data = data
        self._on_host = []


class SelfTeacher(LocalTeacher):
    """The policy itself, with privileged context in its prompt, at its start or as it is now (SDFT, SDPO).

    Args:
        context: What the prompt, or the last message of the user in a chat, becomes for the teacher: a template with `{prompt}`
            for its text, `{answer}` for the reference answer, and the columns of the row. None leaves it, which pulls a policy
            back to its start.
        start: Whether the start policy teaches (the adapter switched off), or the current one.

    Raises:
        ConfigError: If there is nothing to learn, or the template is malformed.
    """

    def __init__(self, context: str | None = None, start: bool = True) -> None:
        if context is None and not start:
            raise ConfigError(
                "SelfTeacher: with start=false and no context the policy would teach itself what it does; give context"
            )
        if context is not None and "prompt" not in template_fields("context", context):
            raise ConfigError(f"SelfTeacher: context={context!r} does not have {{prompt}}; put it where the prompt is to be")
        self.template, self.start = context, start
        self.needs_start_policy = start

    def check(self, student: Passes, distillation: Distillation) -> None:
        """See `Teacher`."""
        super().check(student, distillation)
        if distillation.of_distributions and student.policy.weights.sharded:
            raise ConfigError(
                f"SelfTeacher with {type(distillation).__name__} computes with weights that FSDP2 splits over devices while they "
                "are trained; set model.distillation=SampledReverseKL, or trainer.strategy=ddp"
            )

    def seen(
        self, student: Passes, prompts: Sequence[Prompt], sequences: Sequences, encode: Callable[[Prompt], list[int]]
    ) -> Sequences:
        """See `Teacher`.

        Raises:
            ConfigError: If the row lacks a column of the template, or prompt and completion exceed the model's positions.
        """
        if self.template is None:
            return sequences
        pretrained, samples = student.policy.pretrained, len(sequences) // len(prompts)
        ids = [encode(self.with_context(prompt)) for prompt in prompts]
        longest, (limit, name) = max(map(len, ids)), model_context(pretrained.config)
        if longest + sequences.completion_ids.shape[1] > limit:
            raise ConfigError(
                f"SelfTeacher: a prompt with its context has {longest} tokens, which with a completion exceeds {name}; shorten "
                "context, or lower data.max_prompt_tokens or model.sampler.max_new_tokens"
            )
        rows = [row for row in ids for _ in range(samples)]
        prompt_ids, prompt_mask = pad_left(rows, pad_token(pretrained.tokenizer), sequences.prompt_ids.device)
        return replace(sequences, prompt_ids=prompt_ids, prompt_mask=prompt_mask)

    def with_context(self, prompt: Prompt) -> Prompt:
        """The prompt as the teacher sees it. Override it to give other context."""
        assert self.template is not None
        values = {**prompt.columns, "answer": prompt.answer}
        if prompt.messages is None:
            return replace(prompt, text=fill_template("context", self.template, {**values, "prompt": prompt.text}, prompt.place))
        messages = [dict(message) for message in prompt.messages]
        asked = next(message for message in reversed(messages) if message["role"] == "user")
        asked["content"] = fill_template("context", self.template, {**values, "prompt": asked["content"]}, prompt.place)
        return replace(prompt, messages=tuple(messages))

    def complete(self, student: Generation, passes: Passes, prompts: Sequence[Prompt]) -> Rollouts | None:
        """See `Teacher`: by the current policy, which is the start policy when the doctor asks."""
        hinted = [prompt if self.template is None else self.with_context(prompt) for prompt in prompts]
        return student.generate(hinted, draws=torch.Generator(passes.policy.device).manual_seed(0))

    def passes(self, student: Passes) -> Passes:
        """See `LocalTeacher`."""
        return student

    def context(self, student: Passes) -> AbstractContextManager[Any]:
        """See `LocalTeacher`."""
        return student.policy.start_policy() if self.start else nullcontext()


def check_tokenizers(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError, naming what differs, unless each token has the same id for policy and teacher."""
    ours, theirs = policy.get_vocab(), teacher.get_vocab()
    unlike = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if unlike:
        first = min(unlike, key=lambda token: (ours.get(token, math.inf), theirs.get(token, math.inf)))
        raise ConfigError(
            f"the teacher has another tokenizer than the policy: {len(unlike)} tokens differ, first {first!r}, which is "
            f"{_place(ours, first)} for the policy and {_place(theirs, first)} for the teacher; take a teacher of the policy's "
            "family, whose tokens are the same"
        )


def _place(vocabulary: dict[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "not a token"

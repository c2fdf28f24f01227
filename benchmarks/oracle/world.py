"""Policies over a few completions, so that every expectation is a sum: the true gradient, and what an estimator gives on average.

Two prompts; a completion is an answer, `a` or `b`, and then any number of `x` (say, thoughts), up to three tokens in all:

    .   a.  ax.  axx   b.  bx.  bxx        (`.` ends a completion; those of three tokens without it are cut)

`wide()` has 341 completions of one prompt: every text of up to four tokens from four letters. All numbers are float64.

Axes: P prompts, G completions of each in a rollout, N completions that exist, T tokens, M rollouts, D parameters.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

END = "."
STEP = 0.15  # nats by which a step of training changes log-probabilities, root mean square: far enough to be bounded


@dataclass(frozen=True)
class Language:
    """The completions that exist, and what they earn.

    Attributes:
        texts: N completions; one that does not end in `.` is cut.
        longest: T, the most tokens.
        parts: Name of each term of the reward -> [P, N].
        weights: Name of each term -> its weight.
        failed: [N] bool: completions whose episodes fail, which do not count.
    """

    texts: tuple[str, ...]
    longest: int
    parts: dict[str, Tensor]
    weights: dict[str, float]
    failed: Tensor

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.rewards)

    @property
    def letters(self) -> str:
        """All tokens."""
        return "".join(sorted(set("".join(self.texts))))

    @cached_property
    def rewards(self) -> Tensor:
        """[P, N]."""
        return torch.stack([self.weights[name] * part for name, part in self.parts.items()]).sum(dim=0)

    @cached_property
    def lengths(self) -> Tensor:
        """[N] int64."""
        return torch.tensor([len(text) for text in self.texts])

    @cached_property
    def mask(self) -> Tensor:
        """[N, T] bool, True on tokens."""
        return torch.arange(self.longest) < self.lengths[:, None]

    @cached_property
    def ids(self) -> Tensor:
        """[N, T] int64."""
        return torch.tensor([[self.letters.index(token) for token in text.ljust(self.longest, END)] for text in self.texts])

    @cached_property
    def cut(self) -> Tensor:
        """[N] bool."""
        return torch.tensor([not text.endswith(END) for text in self.texts])

    @cached_property
    def states(self) -> list[str]:
        """Beginnings of completions, after which a token is chosen."""
        return sorted({text[:place] for text in self.texts for place in range(len(text))})

    @cached_property
    def allowed(self) -> Tensor:
        """[states, letters] bool: tokens that may follow."""
        begun = {text[:place] for text in self.texts for place in range(len(text) + 1)}
        return torch.tensor([[state + token in begun for token in self.letters] for state in self.states])

    @cached_property
    def state_of_token(self) -> Tensor:
        """[N, T] int64: the state in which each token is chosen; 0 for padding."""
        places = range(self.longest)
        return torch.tensor(
            [[self.states.index(text[:place]) if place < len(text) else 0 for place in places] for text in self.texts]
        )


def answers(graded: bool = False, failures: bool = False) -> Language:
    """Two prompts. The first wants `a`, the second `b` with at least one `x`; a cut completion is wrong.

    Args:
        graded: The answer and its letter then earn a half each, and every `x` costs a tenth.
        failures: Whether the episode of `ax.` fails, such as by a tool that is down.
    """
    texts = (END, *(letter + "x" * count + END for letter in "ab" for count in range(2)), "axx", "bxx")
    right = torch.tensor([[text in ("a.", "ax.") for text in texts], [text == "bx." for text in texts]]).double()
    parts, weights = {"answer": right}, {"answer": 1.0}
    if graded:
        letters = torch.tensor([[text[0] == letter for text in texts] for letter in "ab"]).double()
        thoughts = torch.tensor([text.count("x") for text in texts]).double().expand(2, -1)
        parts, weights = {**parts, "letter": letters, "length": thoughts}, {"answer": 0.5, "letter": 0.5, "length": -0.1}
    failed = torch.tensor([failures and text == "ax." for text in texts])
    return Language(texts, 3, parts, weights, failed)


def wide() -> Language:
    """One prompt and 341 completions; those with more `a` than `b` are right."""
    texts = ["".join(letters) + END for count in range(4) for letters in itertools.product("abcd", repeat=count)]
    texts += ["".join(letters) for letters in itertools.product("abcd", repeat=4)]
    right = torch.tensor([[text.count("a") > text.count("b") for text in texts]]).double()
    return Language(tuple(texts), 4, {"answer": right}, {"answer": 1.0}, torch.zeros(len(texts), dtype=torch.bool))


class Policy:
    """Logits of the next token: by default parameters, one for each prompt, beginning and token.

    Attributes:
        start: Its parameters, [D].
    """

    def __init__(self, language: Language, seed: int = 0) -> None:
        self.language = language
        self._generator = torch.Generator().manual_seed(seed)
        self.start = self._draw(language.prompts * language.allowed.numel())

    def _draw(self, count: int) -> Tensor:
        return torch.randn(count, generator=self._generator, dtype=torch.float64)

    def logits(self, parameters: Tensor) -> Tensor:
        """[P, states, letters]."""
        return parameters.view(self.language.prompts, *self.language.allowed.shape)

    def logprobs(self, parameters: Tensor) -> Tensor:
        """Log-probability of each token of each completion, [P, N, T]; 0 for padding."""
        language = self.language
        logits = self.logits(parameters).masked_fill(~language.allowed, -math.inf)
        chosen = logits.log_softmax(dim=-1)[:, language.state_of_token, language.ids]
        return torch.where(language.mask, chosen, 0.0)

    def jacobian(self, parameters: Tensor) -> Tensor:
        """Gradients of `logprobs`, [P, N, T, D]."""
        parameters = parameters.clone().requires_grad_()
        flat = self.logprobs(parameters).flatten()
        used = self.language.mask.expand(self.language.prompts, -1, -1).flatten()
        rows = flat.new_zeros(len(flat), len(parameters))
        for place in used.nonzero().flatten().tolist():
            (rows[place],) = torch.autograd.grad(flat[place], parameters, retain_graph=True)
        return rows.view(*self.logprobs(parameters).shape, -1)

    def gradient(self, parameters: Tensor) -> Tensor:
        """The true gradient of the expected reward of completions that count, the mean over prompts, [D]."""
        parameters = parameters.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.value(parameters), parameters)
        return found

    def value(self, parameters: Tensor) -> Tensor:
        """The expected reward of completions that count, the mean over prompts."""
        chances = self.logprobs(parameters).sum(dim=-1).exp() * ~self.language.failed
        return ((chances * self.language.rewards).sum(dim=1) / chances.sum(dim=1)).mean()

    def trained(self, parameters: Tensor, steps: int, size: float = STEP) -> Tensor:
        """The parameters after some steps of training (before, if negative): half along the true gradient, half at random.

        The length of a step is such that log-probabilities change by `size` nats, root mean square.
        """
        sign = 1 if steps > 0 else -1
        for _ in range(abs(steps)):
            directions = [self.gradient(parameters), self._draw(len(parameters))]
            step = sum(direction / direction.norm() for direction in directions)
            before, low, high = self.logprobs(parameters), 0.0, 100.0
            for _ in range(40):  # bisection
                middle = (low + high) / 2
                moved = self._moved(before, parameters + sign * middle * step)
                low, high = (middle, high) if moved < size else (low, middle)
            parameters = parameters + sign * low * step
        return parameters

    @torch.no_grad()
    def _moved(self, before: Tensor, parameters: Tensor) -> float:
        after = self.logprobs(parameters)
        chances = before.sum(dim=-1, keepdim=True).exp() * self.language.mask
        return float(((after - before) ** 2 * chances).sum() / chances.sum()) ** 0.5


class Transformer(Policy):
    """A GPT-2 of one layer and width 8, whose parameters all prompts and beginnings share (others compute norms in float32)."""

    def __init__(self, language: Language, seed: int = 0) -> None:
        self.language = language
        self._generator = torch.Generator().manual_seed(seed)
        tokens = len(language.letters) + language.prompts
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            shape = GPT2Config(
                vocab_size=tokens,
                n_positions=8,
                n_embd=8,
                n_layer=1,
                n_head=2,
                initializer_range=0.5,
                attn_implementation="eager",
                bos_token_id=None,
                eos_token_id=None,
            )
            self.model = GPT2LMHeadModel(shape).double().eval()
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.start = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        rows = [
            [len(language.letters) + prompt, *map(language.letters.index, state)]
            for prompt in range(language.prompts)
            for state in language.states
        ]
        width = max(map(len, rows))
        self._last = torch.tensor([len(row) - 1 for row in rows])
        self._rows = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # a causal model does not see what follows

    def logits(self, parameters: Tensor) -> Tensor:
        """[P, states, letters]."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parameters.split(sizes), strict=True)
        }
        logits = functional_call(self.model, parts, (self._rows,)).logits[torch.arange(len(self._rows)), self._last]
        return logits[:, : len(self.language.letters)].view(self.language.prompts, len(self.language.states), -1)


@dataclass(frozen=True)
class Rollouts:
    """All rollouts that can be drawn, with their probabilities.

    Attributes:
        chosen: [M, P, G] int64: completions. Rollouts that differ only in the order within a group are one.
        counts: [M] float64: the number of such orders.
    """

    chosen: Tensor
    counts: Tensor

    @classmethod
    def of(cls, language: Language, samples: int) -> "Rollouts":
        """The rollouts of `samples` completions of each prompt."""
        groups = list(itertools.combinations_with_replacement(range(len(language.texts)), samples))
        orders = [math.factorial(samples) // math.prod(math.factorial(group.count(o)) for o in set(group)) for group in groups]
        of_group, each = torch.tensor(orders, dtype=torch.float64), torch.tensor(groups)
        numbers = torch.cartesian_prod(*[torch.arange(len(groups))] * language.prompts).view(-1, language.prompts)
        return cls(each[numbers], of_group[numbers].prod(dim=1))

    def chances(self, logprobs: Tensor) -> Tensor:
        """Probabilities under a sampler with these log-probabilities, [P, N, T]; [M]."""
        of_completion = logprobs.sum(dim=-1)
        prompts = torch.arange(len(of_completion))[:, None]
        return self.counts * of_completion[prompts, self.chosen].sum(dim=(1, 2)).exp()


@dataclass(frozen=True)
class Estimate:
    """What an estimator gives on average, beside the true gradient.

    Attributes:
        angle: Between the mean estimate and the true gradient, in degrees; nan if the mean is 0.
        length: Length of the mean estimate / that of the true gradient.
        wrong_sign: Share of the mean estimate (sum of sizes) in parameters whose sign is wrong.
        noise: Standard deviation of an estimate / length of its mean.
        progress: Mean of an estimate along the true gradient, squared / its variance: how much one step is worth.
    """

    angle: float
    length: float
    wrong_sign: float
    noise: float
    progress: float

    @classmethod
    def of(cls, of_tokens: Tensor, chances: Tensor, rollouts: Rollouts, jacobian: Tensor, true: Tensor) -> "Estimate":
        """From the gradients of a loss by log-probabilities.

        Args:
            of_tokens: [M, P, G, T], of every rollout.
            chances: [M].
            rollouts: The rollouts.
            jacobian: [P, N, T, D], of the policy.
            true: [D], the gradient of the expected reward.
        """
        prompts, completions, longest, size = jacobian.shape
        samples = rollouts.chosen.shape[2]
        sums = of_tokens.new_zeros(len(chances), prompts, completions, longest)
        for sample in range(samples):
            place = rollouts.chosen[:, :, sample, None, None].expand(-1, -1, 1, longest)
            sums.scatter_add_(2, place, of_tokens[:, :, sample, None])
        sums = sums.flatten(1)
        flat = jacobian.view(-1, size)
        mean = -(chances @ sums) @ flat  # the direction of descent
        second = ((sums * chances[:, None]).T @ sums * (flat @ flat.T)).sum()
        variance = max(float(second - mean @ mean), 0.0)
        along = float(mean @ true / true.norm())
        length = float(mean.norm())
        if length < 1e-14 * float(true.norm()):
            return cls(math.nan, 0.0, math.nan, math.nan, 0.0)
        sine = float((mean - along * true / true.norm()).norm()) / length  # exact for small angles, as the cosine is not
        wrong = (mean * true < 0) & (mean.abs() > 1e-12 * mean.abs().max())
        return cls(
            angle=math.degrees(math.atan2(sine, along / length)),
            length=length / float(true.norm()),
            wrong_sign=float(mean[wrong].abs().sum() / mean.abs().sum()),
            noise=math.sqrt(variance) / length,
            progress=along * abs(along) / variance if variance else math.inf,
        )


def mean_gradient(of_tokens: Tensor, chances: Tensor, rollouts: Rollouts, shape: Sequence[int]) -> Tensor:
    """Expectation of the gradient by the log-probability of each token, [P, N, T] (see `Estimate.of`)."""
    result = of_tokens.new_zeros(*shape)
    weighted = of_tokens * chances[:, None, None, None]
    for prompt in range(shape[0]):
        result[prompt].index_add_(0, rollouts.chosen[:, prompt].flatten(), weighted[:, prompt].flatten(0, 1))
    return result

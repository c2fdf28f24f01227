"""Log-probabilities of sampled tokens, and how far the whole distributions of a policy and a teacher are apart at each of them.

Neither model's logits are ever there all at once: the states before the output layer are, and become logits block by block.

Axes: B sequences, T completion tokens, K tokens that were sampled, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.engine.passes import base_model, project, projection_weight, separate_logits
from hybrid_lightning.types import Sequences

if TYPE_CHECKING:
    from hybrid_lightning.engine.engine import Engine  # with PEFT, which is slow to import

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probabilities [K, V] of the policy and of the teacher -> [K]


@dataclass(frozen=True)
class Predictions:
    """What predicts K tokens, before and after the output layer."""

    states: Tensor  # [K, N]
    logits: Callable[[Tensor], Tensor]  # of some states, [n, N] -> [n, V]


@dataclass(frozen=True)
class Compared:
    """A policy and its teacher at the sampled tokens, [B, T] float32 each, 0 where nothing was sampled."""

    logprobs: Tensor  # of the policy, with gradient
    entropy: Tensor  # of the policy, in nats
    divergence: Tensor  # with gradient
    teacher_logprobs: Tensor


def predictions(engine: "Engine", sequences: Sequences) -> Predictions:
    """What predicts the sampled tokens of some sequences, as `token_logprobs` computes it."""
    engine.prepare()
    hidden = engine.predicting(sequences)
    if hidden is None:
        return Predictions(separate_logits(engine.model, sequences)[sequences.sampled_mask], lambda logits: logits)
    weight = projection_weight(engine.model)  # converted once, and not for each block
    return Predictions(hidden, lambda part: project(engine.model, engine.backend, part, weight))


def compared_logprobs(
    engine: "Engine",
    sequences: Sequences,
    teacher: Predictions,
    divergence: Divergence,
    temperature: float,
    entropy_gradient: bool = False,
) -> Compared:
    """Compare a policy with what a teacher predicts at the same tokens.

    Of vocabularies that are padded to different sizes the part that both have is compared.

    Args:
        engine: Engine of the policy.
        sequences: B prompts (left-padded) and completions (right-padded, T tokens).
        teacher: Without gradient, of the same tokens, perhaps after other prompts.
        divergence: Of each token.
        temperature: Divides the logits of both.
        entropy_gradient: Whether entropies have a gradient.
    """
    mask = sequences.sampled_mask
    tokens, own = sequences.completion_ids[mask], predictions(engine, sequences)

    def block(states: Tensor, of_teacher: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            theirs = teacher.logits(of_teacher)
        ours = own.logits(states)
        with torch.autocast(mask.device.type, enabled=False):
            ours, theirs = ((logits.float() / temperature).log_softmax(dim=1) for logits in (ours, theirs))
            logprob, of_theirs = (values.gather(1, ids[:, None]).squeeze(1) for values in (ours, theirs))
            entropy = -torch.linalg.vecdot(ours.exp(), ours)
            if ours.shape != theirs.shape:
                width = min(ours.shape[1], theirs.shape[1])
                ours, theirs = (values[:, :width].log_softmax(dim=1) for values in (ours, theirs))
            return logprob, divergence(ours, theirs), entropy, of_theirs

    most = engine.backend.most_logits(mask.device) // base_model(engine.model).config.get_text_config().vocab_size // 2
    count = max(1, -(-len(tokens) // max(1, most)))
    parts = zip(*(values.tensor_split(count) for values in (own.states, teacher.states, tokens)), strict=True)
    layer = base_model(engine.model).get_output_embeddings()
    trained = layer is None or any(parameter.requires_grad for parameter in layer.parameters())
    compute = partial(checkpoint, block, use_reentrant=False) if trained else partial(_known, block, 2 + entropy_gradient)
    blocks = [block(*part) if not torch.is_grad_enabled() else compute(*part) for part in parts]
    logprobs, divergences, entropies, of_teacher = (torch.cat(values) for values in zip(*blocks, strict=True))
    entropies = entropies if entropy_gradient else entropies.detach()
    padded = torch.zeros(mask.shape, device=mask.device)
    return Compared(*(padded.masked_scatter(mask, values) for values in (logprobs, entropies, divergences, of_teacher)))


def _known(block: Callable[..., tuple[Tensor, ...]], count: int, states: Tensor, *given: Tensor) -> Sequence[Tensor]:
    """The values of a block, of which the first `count` have gradients."""
    values: tuple[Tensor, ...] = _Known.apply(states, block, count, *given)
    return values


class _Known(torch.autograd.Function):
    """Values of each row of states, [n, N] -> [n] each, with frozen weights.

    A row's values depend on its states alone. So their gradients are known in the forward pass up to one factor a row, and
    neither logits nor what a divergence computes from them is kept or computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, block: Callable[..., tuple[Tensor, ...]], count: int, *given: Tensor
    ) -> tuple[Tensor, ...]:
        leaf = states.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            values = block(leaf, *given)
            if ctx.needs_input_grad[0]:
                sums = [value.sum() for value in values[:count]]
                ctx.save_for_backward(*(torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums))
        ctx.count, ctx.given = count, len(given)
        values = tuple(value.detach() for value in values)
        ctx.mark_non_differentiable(*values[count:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = zip(ctx.saved_tensors, gradients[: ctx.count], strict=True)
        first, *others = [slope * gradient[:, None].to(slope.dtype) for slope, gradient in slopes]
        return sum(others, start=first), *([None] * (2 + ctx.given))

"""Log-probabilities of sampled tokens, and the divergence between policy and teacher over the vocabulary at each of them.

Hidden states of both models become logits block by block, so the full logits never exist at once.

Axes: B sequences, T completion tokens, K sampled tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.runner.passes import base_model, project, projection_weight, separate_logits
from hybrid_lightning.types import Sequences

if TYPE_CHECKING:
    from hybrid_lightning.runner.model_runner import ModelRunner  # with PEFT, which is slow to import

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probabilities [K, V] of the policy and of the teacher -> [K]
# Predicts K tokens: states [K, N] before the output layer, and the function from some of them to logits [n, V].
Predictions = tuple[Tensor, Callable[[Tensor], Tensor]]


def predictions(runner: "ModelRunner", sequences: Sequences) -> Predictions:
    """States and output layer that predict the sampled tokens, computed as in `token_logprobs`."""
    runner.prepare()
    hidden = runner.predicting(sequences)
    if hidden is None:
        return separate_logits(runner.model, sequences)[sequences.sampled_mask], lambda logits: logits
    weight = projection_weight(runner.model)  # converted once instead of for each block
    return hidden, lambda part: project(runner.model, runner.backend, part, weight)


def compared_logprobs(
    runner: "ModelRunner",
    sequences: Sequences,
    teacher: Predictions,
    divergence: Divergence,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """Compare a policy's and a teacher's predictions of the same tokens. The teacher's prompts may differ.

    The temperature divides the logits of both. If the vocabularies are padded to different sizes, only their common part is
    compared.

    Returns:
        Four tensors [B, T] float32, 0 where nothing was sampled: the policy's log-probabilities and the divergence, both with
        gradient, the policy's entropy, with gradient if `entropy_gradient`, and the teacher's log-probabilities.
    """
    mask = sequences.sampled_mask
    tokens, (its_states, its_logits) = sequences.completion_ids[mask], teacher
    own_states, own_logits = predictions(runner, sequences)

    def block(states: Tensor, of_teacher: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            theirs = its_logits(of_teacher)
        ours = own_logits(states)
        with torch.autocast(mask.device.type, enabled=False):
            ours, theirs = ((logits.float() / temperature).log_softmax(dim=1) for logits in (ours, theirs))
            logprob, of_theirs = (values.gather(1, ids[:, None]).squeeze(1) for values in (ours, theirs))
            entropy = -torch.linalg.vecdot(ours.exp(), ours)
            if ours.shape != theirs.shape:
                width = min(ours.shape[1], theirs.shape[1])
                ours, theirs = (values[:, :width].log_softmax(dim=1) for values in (ours, theirs))
            return logprob, divergence(ours, theirs), entropy, of_theirs

    # A quarter of the usual block: memory holds the logits of two models, and what the divergence computes from them.
    most = runner.backend.most_logits(mask.device) // base_model(runner.model).config.get_text_config().vocab_size // 4
    count = max(1, -(-len(tokens) // max(1, most)))
    parts = zip(*(values.tensor_split(count) for values in (own_states, its_states, tokens)), strict=True)
    layer: Any = base_model(runner.model).get_output_embeddings()
    compute: Callable[..., tuple[Tensor, ...]] = partial(_Known.apply, block, 2 + entropy_gradient)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in layer.parameters()):
        compute = partial(checkpoint, block, use_reentrant=False)
    columns = (torch.cat(values) for values in zip(*(compute(*part) for part in parts), strict=True))
    padded = torch.zeros(mask.shape, device=mask.device)
    logprobs, distance, entropy, of_teacher = (padded.masked_scatter(mask, values) for values in columns)
    return logprobs, distance, entropy if entropy_gradient else entropy.detach(), of_teacher


class _Known(torch.autograd.Function):
    """Values of each row of states, [n, N] -> [n] each. The first `count` have a gradient; weights are frozen.

    A row's values depend only on its own states. So the forward pass knows their gradients up to one factor per row, and
    neither the logits nor the divergence's intermediate results are kept or recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, block: Callable[..., tuple[Tensor, ...]], count: int, states: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[2]
        leaf = states.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            values = block(leaf, *given)
            if wanted:
                sums = [value.sum() for value in values[:count]]
                ctx.save_for_backward(*(torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums))
        ctx.count, ctx.given = count, len(given)
        ctx.mark_non_differentiable(*(values := tuple(value.detach() for value in values))[count:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = zip(ctx.saved_tensors, gradients[: ctx.count], strict=True)
        first, *others = [slope * gradient[:, None].to(slope.dtype) for slope, gradient in slopes]
        return None, None, sum(others, start=first), *([None] * ctx.given)

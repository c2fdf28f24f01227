"""What is put under the oracle: this package's own path to the loss, or any function that makes a loss from tensors.

    def loss(step: Step) -> Tensor          the loss of one optimizer step, for `of_function`
    Rows.of(...), of_own_path(...)          rewards -> advantages -> rows -> corrections -> loss, by the code that training runs
    trl_loss(...)                           TRL's `GRPOTrainer._compute_loss`, as such a function

All rows of a step are of one rollout: P prompts, G completions of each, in prompt-major order; T tokens.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.commands import UsageError
from benchmarks.oracle.world import Language, Rollouts
from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.losses import DrGRPOLoss, ImportanceCorrection, PolicyLoss
from hybrid_lightning.rewards import ExactMatch
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.training import PolicyModule
from hybrid_lightning.training.loop import RLLoop
from hybrid_lightning.training.sampled_groups import policy_batch
from hybrid_lightning.types import Completion, PolicyBatch, Prompt, Rewards, Rollout, Sequences


@dataclass(frozen=True)
class Step:
    """An optimizer step on one whole rollout, as tensors: float64, B = P * G rows.

    Attributes:
        logprobs: [B, T] with gradient: of the policy being trained.
        old_logprobs: [B, T]: of the policy before the rollout's first step.
        sampling_logprobs: [B, T]: of the policy that sampled.
        mask: [B, T] bool, True on tokens; the values above are 0 elsewhere.
        rewards: [P, G].
        cut: [B] bool: completions that end without an end token.
        longest: The most tokens that a completion may have.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    sampling_logprobs: Tensor
    mask: Tensor
    rewards: Tensor
    cut: Tensor
    longest: int


LossFunction = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Probabilities:
    """Log-probabilities of all completions under three policies, [P, N, T] each: see `Step`."""

    current: Tensor
    old: Tensor
    sampling: Tensor

    @property
    def on_policy(self) -> bool:
        """Whether the policy has not been trained since the rollout began."""
        return torch.equal(self.current, self.old)


def of_function(loss: LossFunction, language: Language, rollouts: Rollouts, given: Probabilities) -> Tensor:
    """Gradients of a loss by the log-probability of each token, [M, P, G, T]: one call for every rollout.

    Raises:
        UsageError: If the function returns anything but a tensor of one number with a gradient.
    """
    found = []
    prompts = torch.arange(language.prompts)[:, None]
    for chosen in rollouts.chosen:
        rows = [values[prompts, chosen].flatten(0, 1) for values in (given.current, given.old, given.sampling)]
        rows[0] = rows[0].clone().requires_grad_()
        flat = chosen.flatten()
        value = loss(Step(*rows, language.mask[flat], language.rewards[prompts, chosen], language.cut[flat], language.longest))
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise UsageError("a loss must return a tensor of one number that was made from step.logprobs; add up what it returns")
        (gradient,) = torch.autograd.grad(value.sum(), rows[0], allow_unused=True)
        found.append(torch.zeros_like(rows[0]) if gradient is None else gradient)
    return torch.stack(found).view(*rollouts.chosen.shape, -1)


class _Tables:
    """Stands in for forward passes (`Passes`): log-probabilities are known."""

    def __init__(self) -> None:
        self.current = self.old = torch.zeros(0)

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        return self.current, torch.zeros_like(self.current)

    def measure(self, parts: list[Sequences], current: bool, reference: bool, interruptible: Any) -> list[Any]:
        assert not reference, "no KL term"
        return [(self.old, torch.zeros_like(self.old), None)] if current else [(None, torch.zeros_like(self.current), None)]


@dataclass(frozen=True)
class Rows:
    """The rows of all rollouts with their advantages, as training makes them from completions and rewards.

    Attributes:
        language: The completions.
        rollouts: Of this language.
        batch: M * P * G rows.
        sizes: The number of sequences and of tokens that a step may have -> the rows of all such steps.
    """

    language: Language
    rollouts: Rollouts
    batch: PolicyBatch
    sizes: dict[tuple[float, float], Tensor]

    @classmethod
    def of(cls, language: Language, rollouts: Rollouts, advantage: AdvantageEstimator, mask_truncated: bool = False) -> "Rows":
        """Made with any estimator, and `PolicyModule.mask_truncated_completions`."""
        task = _task(language, rollouts, DrGRPOLoss(), advantage=advantage, mask_truncated_completions=mask_truncated)
        count, prompts, samples = rollouts.chosen.shape
        flat, of_prompt = rollouts.chosen.flatten(), torch.arange(prompts)[:, None]
        texts = [Completion(text, len(text), not cut) for text, cut in zip(language.texts, language.cut.tolist(), strict=True)]
        total = language.rewards[of_prompt, rollouts.chosen].view(-1, samples)
        parts = {name: part[of_prompt, rollouts.chosen].view(-1, samples) for name, part in language.parts.items()}
        counted = None if not language.failed.any() else ~language.failed[flat].view(-1, samples)
        rewards = Rewards(total, parts, total > 0, language.weights, counted)
        ids, nothing = language.ids[flat], torch.zeros(len(flat), 1, dtype=torch.long)
        rollout = Rollout(
            (Prompt(text=""),) * (count * prompts),
            tuple(texts[place] for place in flat.tolist()),
            Sequences(nothing, nothing == 0, ids, language.mask[flat], weights_step=torch.zeros_like(ids)),
            torch.zeros(ids.shape, dtype=torch.float64),
            rewards=rewards,
        )
        rollout = replace(rollout, advantages=_advantages(advantage, rewards, count))
        batch = policy_batch(rollout, task.rows_of_loss(rollout))
        of_step = [batch.row_weights.double(), batch.sequences.sampled_mask.sum(dim=1).double()]  # as `minibatch` counts them
        size_of_step = torch.stack([values.view(count, -1).sum(dim=1) for values in of_step], dim=1)
        rows, sizes = torch.arange(len(flat)).view(count, -1), {}
        for sequences, tokens in size_of_step.unique(dim=0).tolist():
            same = (size_of_step == torch.tensor([sequences, tokens], dtype=torch.float64)).all(dim=1)
            sizes[sequences, tokens] = rows[same].flatten()
        return cls(language, rollouts, replace(batch, rollout=None), sizes)


def _advantages(estimator: AdvantageEstimator, rewards: Rewards, count: int) -> Tensor:
    """Advantages of all groups, [M * P, G]. The estimator sees one rollout at a time, and each pattern of rewards once."""
    seen = [rewards.total, *rewards.parts.values(), *([] if rewards.counted is None else [rewards.counted.double()])]
    patterns, place = torch.stack([part.reshape(count, -1) for part in seen], dim=1).unique(dim=0, return_inverse=True)
    firsts = torch.full((len(patterns),), count).scatter_reduce_(0, place, torch.arange(count), "amin")
    groups = len(rewards.total) // count
    found = [estimator.of_rewards(rewards.select(slice(first * groups, (first + 1) * groups))) for first in firsts.tolist()]
    return torch.stack(found)[place].flatten(0, 1)


def _task(language: Language, rollouts: Rollouts, loss: PolicyLoss, **options: Any) -> RLLoop:
    sampler = Sampler(max_new_tokens=language.longest)
    return PolicyModule(loss, ExactMatch(), sampler=sampler, samples_per_prompt=rollouts.chosen.shape[2], **options).task


def of_own_path(
    rows: Rows, loss: PolicyLoss, given: Probabilities, correction: ImportanceCorrection | None = None, ahead: bool = False
) -> Tensor:
    """Gradients of this package's loss by the log-probability of each token, [M, P, G, T]: every rollout is an optimizer step.

    All is done by the code that training runs (`RLLoop`), except that forward passes are looked up. Steps with equal denominators
    share a call of `chunk_loss`, since a loss is a sum of shares of its rows.

    Args:
        rows: Of all rollouts.
        loss: Any loss without KL term and entropy bonus.
        given: The policies.
        correction: As `PolicyModule.correction`.
        ahead: Whether rollouts are sampled ahead, with other weights than those before the rollout's first step.
    """
    chosen = rows.rollouts.chosen
    task, tables = _task(rows.language, rows.rollouts, loss, correction=correction, rollouts_ahead=int(ahead)), _Tables()
    task.passes = task.teaching.passes = tables  # type: ignore[assignment]
    of_prompt = torch.arange(chosen.shape[1])[:, None]
    current, old, sampling = (values[of_prompt, chosen].flatten(0, 2) for values in (given.current, given.old, given.sampling))
    result = torch.zeros_like(current)
    for (sequences, tokens), of_size in rows.sizes.items():
        learned = of_size if task.needs_all_rows else of_size[rows.batch.advantages[of_size] != 0]
        if not len(learned):
            continue
        sizes = {"num_sequences": sequences, "num_tokens": tokens, "updated_sequences": sequences, "updated_tokens": tokens}
        batch = replace(rows.batch.rows(learned), **sizes)
        width = batch.sequences.completion_ids.shape[1]
        batch = replace(batch, sampling_logprobs=sampling[learned, :width])
        tables.current, tables.old = current[learned, :width].requires_grad_(), old[learned, :width]
        (batch,) = task.add_logprobs([batch], given.on_policy)
        value, _ = task.chunk_loss(batch, tokens)
        (result[learned, :width],) = torch.autograd.grad(value, tables.current)
    return result.view(*chosen.shape, -1)


def trl_loss(loss_type: str, scale_rewards: str = "group", **settings: Any) -> LossFunction:
    """The loss of TRL's `GRPOTrainer` as a function of a `Step`.

    Args:
        loss_type: As TRL names it; "gspo" for its `grpo` with `importance_sampling_level="sequence"`.
        scale_rewards: As TRL names it: "group", "batch" or "none".
        settings: Other attributes of the trainer, such as `epsilon_low`.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    sequence = loss_type in ("gspo", "luspo")
    clip = {"epsilon_low": 3e-4, "epsilon_high": 4e-4} if sequence else {"epsilon_low": 0.2, "epsilon_high": 0.2}
    if loss_type == "cispo":
        clip["epsilon_high"] = 5.0

    class Accelerator:
        num_processes = 1

        @staticmethod
        def gather(value: Any) -> Any:
            return value

        @staticmethod
        def reduce(value: Any, reduction: str) -> Any:
            return value

    def loss(step: Step) -> Tensor:
        rewards = step.rewards
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        if scale_rewards == "group":
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
        elif scale_rewards == "batch":
            advantages = advantages / (rewards.std() + 1e-4)
        vespo = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
        temperature = {f"sapo_temperature_{sign}": step.rewards.new_tensor(t) for sign, t in (("pos", 1.0), ("neg", 1.05))}
        trainer = SimpleNamespace(
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            _get_per_token_logps_and_entropies=lambda *a, **k: (step.logprobs, torch.zeros_like(step.logprobs), None),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1, **temperature, **vespo),
            model=SimpleNamespace(training=True),
            accelerator=Accelerator,
            current_gradient_accumulation_steps=1,
            loss_type="grpo" if loss_type == "gspo" else loss_type,
            importance_sampling_level="sequence" if sequence else "token",
            max_completion_length=step.longest,
            entropy_coef=0.0,
            beta=0.0,
            top_entropy_quantile=1.0,
            use_vllm=False,
            use_adaptive_entropy=False,
            aux_loss_enabled=False,
            vllm_importance_sampling_correction=True,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
            off_policy_mask_threshold=None,
            **{**clip, **settings},
        )
        empty = torch.zeros(len(step.mask), 1, dtype=torch.long)
        batch = {
            "prompt_ids": empty,
            "prompt_mask": empty,
            "completion_ids": torch.zeros_like(step.mask, dtype=torch.long),
            "completion_mask": step.mask.long(),
            "advantages": advantages.flatten(),
            "old_per_token_logps": step.old_logprobs,
            "num_items_in_batch": step.mask.sum(),
        }
        value: Tensor = GRPOTrainer._compute_loss(trainer, None, batch)
        return value

    return loss

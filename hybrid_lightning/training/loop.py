"""`RLLoop`: the loop of reinforcement learning, in the order in which it runs.

    prompts             `RolloutLoader` draws them and calls `begin`, perhaps some rollouts ahead of training
    sample, score       G episodes of each prompt, and their rewards; slow rewards begin while others are still sampled
    credit, advantages  rewards relative to their group, over all ranks: the loader calls `finish`
    teacher             adds to the advantages, or prepares what it adds to the loss
    minibatches         rows of each optimizer step, with its denominators
    log-probabilities   of the policy before the rollout's first step, and of the start policy: the loader calls `add_logprobs`
    loss                `OptimizerStep` calls `chunk_loss`; the backward pass follows, and Lightning calls the optimizer

A `Rollout` is enriched on its way to `PolicyBatch`es. `rl_task.py` has what an algorithm chooses; `rollout/loader.py` iterates.

Axes: P prompts, G episodes per prompt, B rows, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import share
from hybrid_lightning.rollout.interface import Begun
from hybrid_lightning.rollout.loader import DrawPrompts
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.training.rl_task import RLTask
from hybrid_lightning.training.sampled_groups import rows_to_train, sample_groups, with_advantages
from hybrid_lightning.training.token_weights import compare_with_sampler, mask_tokens, sampling_metrics, versions_of_rows
from hybrid_lightning.types import PolicyBatch, Prompt, Rollout


class RLLoop(RLTask):
    """Trains a policy on its own rollouts."""

    # ---- prompts -> sample -> score

    def begin(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> Begun[Rollout]:
        """Begin to complete prompts; with dynamic sampling, until enough groups teach something."""
        self.teaching.free_memory()
        begun, rule = self.sample(prompts, generator), self.options.dynamic_sampling
        if rule is None:
            return begun
        more = lambda some: self.sample(some, generator).result()  # noqa: E731
        return Begun.of(sample_groups(rule, begun.result(), draw_more, more, self.useful_groups))

    def sample(self, prompts: Sequence[Prompt], generator: torch.Generator) -> Begun[Rollout]:
        """Begin to complete prompts; the result is scored."""
        # Random numbers depend on the position in the rollout: a prompt has the same completions for any number of ranks.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        places = range(self.run.rank, len(prompts) * self.run.world_size, self.run.world_size)
        samples, generation = self.schedule.samples_per_prompt, self.generation
        draws, arriving = PromptDraws(prompts, samples, seed, places), generation.arriving(prompts, samples)
        with self.phase("generate", on_failure=arriving.cancel):
            generation.update(ahead=True)
            begun = generation.begin(
                prompts, samples, draws, on_completion=arriving.on_completion, listen=self.teaching.listen, ahead=True
            )

        def score(rollout: Rollout) -> Rollout:
            with self.phase("reward"):
                return generation.score(rollout, arriving)

        # An engine in this process has sampled by now; the rest waits until the loader asks for the result.
        return begun.within(lambda: self.phase("generate")).then(score, on_cancel=arriving.cancel)

    # ---- credit -> advantages -> teacher -> minibatches

    def finish(self, rollout: Rollout, number: int) -> list[PolicyBatch]:
        """The minibatches of a scored rollout. The metrics cover all completions, even those that are not trained on."""
        self.generation.sampler.release_memory()
        wanted, credited = self.schedule.prompts_per_rollout, self.credit(rollout)
        with self.run.clock.phase("reward"):
            rollout = with_advantages(rollout, credited, self.options.advantage, wanted)
        sequences = self.rows_of_loss(rollout)
        rollout = replace(rollout, metrics=self.measure(rollout, credited, sequences) | rollout.metrics)
        rollout, seen = self.teaching.teach(rollout, sequences)
        batch = rows_to_train(rollout, sequences, wanted, self.schedule.minibatches_per_rollout, self.run.rank, seen)
        return self.minibatches(batch, number)

    # ---- log-probabilities

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in old and reference log-probabilities and the token mask, if they are needed.

        Old log-probabilities are computed as in training, not taken from the sampler, so the ratio of the first minibatch is
        exactly 1, which GSPO's narrow clip range needs. With rollouts ahead, the sampler had earlier weights. The old
        log-probabilities are then the policy's before the rollout's first step, and the correction weights tokens by their
        distance to the sampler's (decoupled PPO, arXiv 2110.00641). Without a correction, they are the sampler's.
        """
        mask, of_sampler, reference = self.options.token_mask, self.old_of_sampler, self.loss.needs_reference
        if of_sampler:
            batches = [replace(batch, old_logprobs=batch.sampling_logprobs) for batch in batches]
        current = mask is not None or not (on_policy or of_sampler)
        if not current and not reference:
            return list(batches)
        with self.phase("logprobs"):
            sequences = [batch.sequences for batch in batches]
            measured = self.passes.measure(sequences, current, reference, self.run.interruptible)
        filled = []
        for batch, (old, _, start) in zip(batches, measured, strict=True):
            if not of_sampler:  # exactly on-policy, the loss takes those of its own pass
                batch = replace(batch, old_logprobs=None if on_policy else old)
            filled.append(replace(batch, ref_logprobs=start))
        return filled if mask is None else mask_tokens(filled, [entropy for _, entropy, _ in measured], mask)

    # ---- loss

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares of the optimizer step's loss and metrics."""
        # The policy's forward pass, and with a divergence the teacher's.
        logprobs, entropy, divergence, measured = self.teaching.predict(chunk)
        difference, weights = compare_with_sampler(chunk, logprobs, self.options.correction, self.old_of_sampler)
        inputs = chunk.loss_inputs(
            logprobs,
            None if weights is None else F.per_token(weights, chunk.sequences.sampled_mask),
            entropy=entropy,
            divergence=divergence,
            max_completion_tokens=float(self.generation.max_completion_tokens),
            micro_batch_tokens=micro_batch_tokens,
            num_micro_batches=float(self.run.accumulate_grad_batches * self.run.world_size),
        )
        metrics = sampling_metrics(difference, weights, inputs)
        made_by = cast(Tensor, chunk.sequences.weights_step)  # all rows were sampled
        metrics["sampling/weights_version_lag"] = share((self.run.step - made_by).float(), inputs)
        if self.generation.inflight_updates:
            metrics["sampling/weights_versions"] = share(versions_of_rows(made_by, inputs.sampled_mask), inputs)
        metrics |= {name: share(values, inputs) for name, values in measured.items()}
        if chunk.policy_mask is not None:
            metrics["top_entropy/share"] = share(chunk.policy_mask.to(entropy.dtype), inputs)
        output = self.loss(inputs)
        return output.loss, {**output.metrics, **metrics}

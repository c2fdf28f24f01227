"""`CalibratedModule`: a policy whose own training objective says how its modules are scored."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.adapters.kept_scoring import KeptScoring
from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.calibration import AnswerCalibration, RewardCalibration
from hybrid_lightning.policy.updated import UpdatedModule
from hybrid_lightning.rollout.batching import join_rewards, join_rollouts
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollouts, Sequences


class CalibratedModule(UpdatedModule):
    """Calibration losses for `HybridAdapterSetup`; a subclass sets the attributes."""

    advantage: AdvantageEstimator

    def calibration_losses(
        self, num_prompts: int | None = None, kept: KeptScoring | None = None
    ) -> RewardCalibration | AnswerCalibration:
        """Losses whose mean gradient scores the modules: of rollouts of the start policy on training prompts.

        Where all rewards tie there is no gradient; then the reference answers are used (supervised), where the data has them.

        Args:
            num_prompts: Training prompts to use; fewer if there are not as many. None: as many as one rollout has.
            kept: Keeps completions and rewards as they are made, and has those that a stopped run has made.

        Raises:
            ConfigError: If there are too few training prompts, or all completions are masked.
            CalibrationError: If rewards tie and there are no answers.
        """
        prompts = self._train_prompts()
        self.check_enough(prompts)
        order = PromptOrder(prompts, seed=0).of(self.seed + 7919)
        count = self.rollout_schedule.prompts_per_rollout if num_prompts is None else num_prompts
        chosen = [prompts[i] for i in order[:count]]
        # Not self.device: the callback has moved the model, and Lightning moves this module only after the setup hooks.
        device = next(self.model.parameters()).device
        samples = self.rollout_schedule.samples_per_prompt
        rollouts, rewards = self._calibration_rollouts(chosen, samples, kept or KeptScoring(), device)
        advantages = self.advantage.of_rewards(rewards, samples)
        sequences = self.trained_sequences(rollouts)
        if not sequences.completion_mask.any():
            raise ConfigError(
                f"all {len(sequences)} calibration completions were cut at max_new_tokens={self.sampler.max_new_tokens}, and "
                "model.mask_truncated_completions leaves those out of the loss, so that nothing would be learned; raise "
                "model.sampler.max_new_tokens, or set model.mask_truncated_completions=false"
            )
        max_tokens = self._token_budget()
        losses: RewardCalibration | AnswerCalibration
        if bool(advantages[sequences.completion_mask.any(dim=1)].any()):
            longest = self.sampler.max_new_tokens
            losses = RewardCalibration(sequences, advantages, self.loss, self._calibration_logprobs, max_tokens, longest)
        else:
            ids = [self.encode(prompt) for prompt in chosen]
            losses = AnswerCalibration(chosen, ids, self.tokenizer, self._calibration_logprobs, max_tokens, device)
        losses.info["prompts"] = len(chosen)
        return losses

    def _calibration_rollouts(
        self, prompts: Sequence[Prompt], samples: int, kept: KeptScoring, device: torch.device
    ) -> tuple[Rollouts, Rewards]:
        """Complete and score prompts, of which as many together as in a rollout."""
        ids = [self.encode(prompt) for prompt in prompts]
        kept.require({"calibration prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]})
        parts: list[tuple[Rollouts, Rewards]] = []
        together = self.rollout_schedule.prompts_per_rollout
        for start in range(0, len(prompts), together):
            some = prompts[start : start + together]

            def complete(some: Sequence[Prompt] = some, start: int = start) -> dict[str, Any]:
                draws = PromptDraws(some, samples, self.seed + 7919, range(start, start + len(some)))
                return _completions_to_state(self.generate(some, samples, draws))

            rollouts = _completions_from_state(kept.recall(f"completions-{start // together}", complete), some, samples, device)

            def score(rollouts: Rollouts = rollouts) -> dict[str, Any]:
                return vars(self.score(rollouts).to("cpu"))

            rewards = Rewards(**kept.recall(f"rewards-{start // together}", score)).to(device)
            parts.append((rollouts, rewards))
        return join_rollouts([rollouts for rollouts, _ in parts]), join_rewards([rewards for _, rewards in parts])

    def _calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        with self._precision():
            return self.logprobs(sequences)


def _completions_to_state(rollouts: Rollouts) -> dict[str, Any]:
    """Rollouts as plain data and tensors on the CPU."""
    texts = [(str(text), text.num_tokens, text.finished, text.thinking) for text in rollouts.completions]
    tensors = {"sampling_logprobs": rollouts.sampling_logprobs.cpu(), "finished": rollouts.finished.cpu()}
    return {"sequences": vars(rollouts.sequences.to("cpu")), "completions": texts, **tensors}


def _completions_from_state(state: dict[str, Any], prompts: Sequence[Prompt], samples: int, device: torch.device) -> Rollouts:
    """The rollouts that `_completions_to_state` was given."""
    return Rollouts(
        prompts=tuple(prompts),
        sequences=Sequences(**state["sequences"]).to(device),
        completions=tuple(Completion(*completion) for completion in state["completions"]),
        sampling_logprobs=state["sampling_logprobs"].to(device),
        finished=state["finished"].to(device),
        samples_per_prompt=samples,
    )

"""`CalibratedModule`: a policy whose own training objective says how its modules are scored."""

import torch
from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.calibration import AnswerCalibration, RewardCalibration
from hybrid_lightning.policy.updated import UpdatedModule
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.types import Sequences


class CalibratedModule(UpdatedModule):
    """Calibration losses for `HybridAdapterSetup`; a subclass sets the attributes."""

    advantage: AdvantageEstimator

    def calibration_losses(self, num_prompts: int | None = None) -> RewardCalibration | AnswerCalibration:
        """Losses whose mean gradient scores the modules: of rollouts of the start policy on training prompts.

        Where all rewards tie there is no gradient; then the reference answers are used (supervised), where the data has them.

        Args:
            num_prompts: Training prompts to use; fewer if there are not as many. None: as many as one rollout has.

        Raises:
            ConfigError: If there are too few training prompts, or all completions are masked.
            CalibrationError: If rewards tie and there are no answers.
        """
        prompts = self._train_prompts()
        self.rollout_schedule.check_prompts(len(prompts))
        order = PromptOrder(prompts, seed=0).of(self.seed + 7919)
        count = self.rollout_schedule.prompts_per_rollout if num_prompts is None else num_prompts
        chosen = [prompts[i] for i in order[:count]]
        # Not self.device: the callback has moved the model, and Lightning moves this module only after the setup hooks.
        device = next(self.model.parameters()).device
        generator = torch.Generator(device=device).manual_seed(self.seed + 7919)
        samples = self.rollout_schedule.samples_per_prompt
        rollouts = self.generate(chosen, samples, generator)
        rewards = self.score(rollouts)
        advantages = self.advantage.of_rewards(rewards, samples)
        sequences = self.taught_sequences(rollouts)
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

    def _calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        with self._precision():
            return self.logprobs(sequences)

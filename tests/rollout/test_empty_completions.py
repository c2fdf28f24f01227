"""A completion that is masked has no tokens left."""

from dataclasses import replace

import torch
from test_loader import Source, build

from hybrid_lightning.rollout.loader import RolloutSchedule


def test_completions_without_tokens_count_as_sequences_alone():
    class Masked(Source):
        def roll_out(self, prompts, generator, draw_more=None):
            sequences, *rest = super().roll_out(prompts, generator)
            self.kept = torch.arange(len(sequences)) % 3 > 0
            return (replace(sequences, completion_mask=sequences.completion_mask & self.kept[:, None]), *rest)

    source = Masked(2)
    step = next(iter(build(source=source, schedule=RolloutSchedule(4, 2))))
    assert step.num_sequences == 8 and step.updated_sequences == len(step.sequences) == int(source.kept.sum()) == 5
    assert step.num_tokens == step.updated_tokens == float(step.sequences.completion_mask.sum()) > 0

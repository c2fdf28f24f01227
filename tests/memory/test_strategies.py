"""What each of several devices holds."""

import copy
import re
from dataclasses import replace

import pytest
from tiny_memory import Case, with_flags

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory import DDP, FSDP2, SingleDevice, plan_memory
from hybrid_lightning.memory.memory_table import gathers_note
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.rollout.loader import RolloutSchedule

SETTINGS = with_flags(Case(0.0, validation=0).settings(), on_cpu=False)
HYBRID = with_flags(Case(0.5, validation=0).settings(), on_cpu=False)


def planned(sharding, settings=SETTINGS):
    return plan_method(with_flags(settings, sharding=sharding))


def test_ddp_holds_all_and_the_gradients_once_more_and_fsdp2_a_part_and_the_whole_of_what_computes():
    one, two, four = map(planned, (SingleDevice(), DDP(2), FSDP2(4)))
    for moment in ("generating", "updating"):
        assert two.peaks[moment].weights == one.peaks[moment].weights
        assert two.peaks[moment].copies == 4 * one.trainable and one.peaks[moment].copies == 0
    assert two.peaks["generating"].cache == one.peaks["generating"].cache / 2, "prompts are dealt"
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four.peaks["generating"], name) == getattr(one.peaks["generating"], name) / 4 > 0
    config, whole = SETTINGS.config, one.peaks["generating"].weights
    outside = 4 * (2 * config.vocab_size + 1) * config.hidden_size  # embeddings, output layer and the last norm
    assert four.peaks["generating"].copies == whole + outside
    assert 0 < four.peaks["updating"].copies < four.peaks["generating"].copies


def test_fsdp2_scores_with_a_part_of_the_base():
    one, two, four = (planned(sharding, HYBRID).peaks for sharding in (SingleDevice(), DDP(2), FSDP2(4)))
    for moment in ("calibrating", "scoring"):
        assert two[moment] == one[moment], "the first device scores and has all of the base"
        assert four[moment].weights == one[moment].weights / 4 > 0
        assert four[moment].activations == one[moment].activations
    assert four["calibrating"].copies > one["calibrating"].weights, "gathered to sample"
    assert one["scoring"].copies == 0 < four["scoring"].copies < one["scoring"].weights, "a block or two at a time"


def test_a_pass_of_fsdp2_is_largest_where_it_begins_if_what_is_outside_of_blocks_is_wide():
    config = copy.deepcopy(SETTINGS.config)
    config.vocab_size = 100_000
    few = replace(SETTINGS, config=config, completion_tokens=2, schedule=RolloutSchedule(2, 1))
    outside = 4 * (2 * config.vocab_size + 1) * config.hidden_size
    assert planned(FSDP2(2), few).peaks["updating"].copies == pytest.approx(2 * outside, rel=0.05), "the outside is there twice"


def test_what_is_offloaded_is_not_on_the_device():
    plain, offloaded = planned(FSDP2(4)), planned(FSDP2(4, cpu_offload=True))
    assert plain.host == 0 and "optimizer step" not in offloaded.peaks
    for moment in ("generating", "updating"):
        one, other = plain.peaks[moment], offloaded.peaks[moment]
        assert other.weights == other.gradients == other.optimizer == 0
        assert (other.copies, other.activations, other.cache) == (one.copies, one.activations, one.cache)
    held = plain.peaks["generating"]
    assert offloaded.host == held.weights + held.gradients + held.optimizer


def test_what_passes_receive_from_other_devices_and_with_which_option_it_is_less():
    def note(sharding, **changes):
        settings = replace(with_flags(SETTINGS, sharding=sharding, device_bytes=20 * 2**20), completion_tokens=50, **changes)
        return gathers_note(plan_method(settings), settings)

    assert note(DDP(2)) is note(SingleDevice()) is None
    start = r"Weights from other devices: ([\d.]+) MiB to each, in (\d+) forward and backward passes per rollout"
    few = re.fullmatch(start, note(FSDP2(2), gradient_checkpointing=True))
    many = re.fullmatch(rf"{start}; with --model.gradient_checkpointing=true {few[1]} MiB, in {few[2]}", note(FSDP2(2)))
    part = planned(FSDP2(2)).peaks["generating"].weights / 2**20  # of each device, which receives as much
    assert int(many[2]) > int(few[2]) and float(many[1]) == pytest.approx(2 * int(many[2]) * part, rel=0.01)
    least = f"; without model.max_tokens_per_micro_batch {many[1]} MiB, in {many[2]}"
    assert note(FSDP2(2), max_tokens_per_micro_batch=60).endswith(least)


@pytest.mark.parametrize(
    ("sharding", "changes", "message"),
    [
        (SingleDevice(), {"prompt_tokens": 10**5}, "positions; lower"),
        (DDP(3), {}, "prompts_per_rollout=8 must be a multiple of the 3 devices"),
    ],
)
def test_what_fit_refuses_is_not_planned(sharding, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_memory(with_flags(replace(SETTINGS, **changes), sharding=sharding))

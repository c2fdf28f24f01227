"""What each of several devices holds, and what an optimizer keeps."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_memory import Case

from hybrid_lightning.adapters import ModuleBudget
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory import DDP, FSDP1, FSDP2, SingleDevice, plan_memory
from hybrid_lightning.memory.peaks import _Run, plan_method
from hybrid_lightning.memory.sizes import OptimizerBytes, optimizer_bytes
from hybrid_lightning.policy import NF4

pytestmark = pytest.mark.usefixtures("untraced")
SETTINGS = replace(Case(validation=0).settings(), on_cpu=False)


def lora(sharding, settings=SETTINGS):
    """Of the methods that `plan_memory` gives this one alone."""
    return _Run(settings, sharding).method("LoRA", ModuleBudget(0.0))


def test_ddp_holds_all_and_the_gradients_once_more_and_fsdp_a_share_and_the_whole_of_what_computes():
    one, two, four, older = map(lora, (SingleDevice(), DDP(2), FSDP2(4), FSDP1(4)))
    for moment in ("generating", "updating"):
        assert two.peaks[moment].weights == one.peaks[moment].weights
        assert two.peaks[moment].copies == 4 * one.trainable and one.peaks[moment].copies == 0
    assert two.peaks["generating"].cache == one.peaks["generating"].cache / 2, "prompts are dealt"
    assert plan_method(replace(SETTINGS, budget=ModuleBudget(0.0)), FSDP2(4)) == four, "it is the method of the plan"
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four.peaks["generating"], name) == getattr(one.peaks["generating"], name) / 4 > 0
    config, whole = SETTINGS.config, one.peaks["generating"].weights
    outside = 4 * (2 * config.vocab_size + 1) * config.hidden_size  # embeddings, output layer and the last norm
    assert four.peaks["generating"].copies == whole + outside
    assert 0 < four.peaks["updating"].copies < four.peaks["generating"].copies
    assert older.peaks["generating"].gradients == (whole - outside) / 4, "frozen weights of blocks have gradients, too"
    assert older.peaks["generating"].copies == whole


def test_fsdp2_alone_scores_with_a_share_of_the_base():
    one, four, older = (
        _Run(SETTINGS, sharding).method("hybrid", ModuleBudget(0.5)).peaks for sharding in (SingleDevice(), FSDP2(4), FSDP1(4))
    )
    for moment in ("calibrating", "scoring"):
        assert older[moment] == one[moment], "by the first device, which has all of it"
        assert four[moment].weights == one[moment].weights / 4 > 0
        assert four[moment].activations == one[moment].activations
    assert four["calibrating"].copies > one["calibrating"].weights, "gathered to sample"
    assert one["scoring"].copies == 0 < four["scoring"].copies < one["scoring"].weights, "a block or two at a time"


def test_a_pass_of_fsdp2_is_largest_where_it_begins_if_what_is_outside_of_blocks_is_wide():
    config = copy.deepcopy(SETTINGS.config)
    config.vocab_size = 100_000
    few = replace(SETTINGS, config=config, completion_tokens=2, samples_per_prompt=1, prompts_per_rollout=2)
    outside = 4 * (2 * config.vocab_size + 1) * config.hidden_size
    assert lora(FSDP2(2), few).peaks["updating"].copies == pytest.approx(2 * outside, rel=0.05), "which is there twice"


@pytest.mark.parametrize("kind", [FSDP2, FSDP1])
def test_what_is_offloaded_is_not_on_the_device(kind):
    plain, offloaded = lora(kind(4)), lora(kind(4, cpu_offload=True))
    assert plain.host == 0 and "optimizer step" not in offloaded.peaks
    for moment in ("generating", "updating"):
        one, other = plain.peaks[moment], offloaded.peaks[moment]
        assert other.weights == other.gradients == other.optimizer == 0
        assert (other.copies, other.activations, other.cache) == (one.copies, one.activations, one.cache)
    held = plain.peaks["generating"]
    sums = plain.trainable if kind is FSDP1 else 0  # of gradients, which FSDP1 does not add there
    assert offloaded.host == held.weights + held.gradients + held.optimizer + sums


def test_optimizers_are_asked():
    adam, momentum = torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)
    cases = {(adam,): (8, 4), (partial(adam, fused=True),): (8, 0), (momentum,): (4, 4)}
    for given, (state, step) in cases.items():
        assert optimizer_bytes(*given) == OptimizerBytes(state, step)
    with pytest.raises(ConfigError, match=r"model\.optimizer cannot be planned for"):
        optimizer_bytes(torch.optim.LBFGS)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    eight = optimizer_bytes(bitsandbytes.optim.AdamW8bit)
    assert 2 <= eight.state < 2.1 and eight.step == 0


@pytest.mark.parametrize(
    ("sharding", "changes", "message"),
    [
        (SingleDevice(), {"prompt_tokens": 10**5}, "positions; lower"),
        (DDP(3), {}, "prompts_per_rollout=8 must be a multiple of the 3 devices"),
        (FSDP2(2), {"quantization": "NF4"}, "quantization=NF4 does not work with FSDP2"),
        (FSDP1(2), {"dtype": torch.bfloat16}, r"FSDP1 wants one dtype, but trained weights are torch\.float32"),
    ],
)
def test_what_fit_refuses_is_not_planned(sharding, changes, message):
    if "quantization" in changes:
        pytest.importorskip("bitsandbytes")
        changes = {"quantization": NF4()}
    with pytest.raises(ConfigError, match=message):
        plan_memory(replace(SETTINGS, **changes), sharding)

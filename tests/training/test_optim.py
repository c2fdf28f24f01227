import math
from functools import partial

import pytest
import torch
from tiny_models import build_model
from tiny_runs import build_policy
from torch import nn

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.training.optim import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    OptimizerBytes,
    build_optimizer,
    optimizer_bytes,
    rate_of_full_modules,
)


def factors(schedule, total, count=None):
    return [schedule.factor(step, total) for step in range(total if count is None else count)]


def test_a_warm_up_rises_in_equal_steps_and_a_line_or_half_a_cosine_falls_to_its_end():
    assert factors(ConstantSchedule(warmup_steps=3), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(ConstantSchedule(), 3) == [1.0, 1.0, 1.0]
    assert ConstantSchedule(2).factor(10**9, math.inf) == 1.0
    assert factors(LinearSchedule(warmup_steps=9), 3) == [0.1, 0.2, 0.3], "a run shorter than its warm-up"
    assert factors(LinearSchedule(), 4, 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(LinearSchedule(warmup_steps=1, final_factor=0.5), 5, 6) == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    expected = [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0.0]
    assert factors(CosineSchedule(), 4, 5) == pytest.approx(expected)
    assert CosineSchedule(final_factor=0.1).factor(50, 10) == pytest.approx(0.1), "it never rises again"
    expected = [1 / 3, 2 / 3, *(0.2 + 0.8 * value for value in expected)]
    assert factors(CosineSchedule(warmup_steps=2, final_factor=0.2), 6, 7) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantSchedule(-1), r"warmup_steps must not be negative, got -1"),
        (lambda: LinearSchedule(final_factor=1.5), r"final_factor must be between 0 and 1, got 1\.5"),
        (lambda: CosineSchedule().factor(1, math.inf), r"needs the run's length in steps; set trainer\.max_steps"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def build(optimizer=torch.optim.SGD, schedule=None, total=4, **groups):
    schedule = schedule or ConstantSchedule()
    return build_optimizer(optimizer, groups, schedule, total)


def parameters(count=1):
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_an_empty_group_is_left_out_and_none_at_all_is_refused():
    assert [group["name"] for group in build(full=([], 0.1), lora=(parameters(), 1.0))["optimizer"].param_groups] == ["lora"]
    with pytest.raises(ConfigError, match="no trainable parameters; add the callback HybridAdapterSetup"):
        build(full=([], 0.1), lora=([], 1.0))
    with pytest.raises(ConfigError, match="run's length"):  # before the warm-up
        build(schedule=CosineSchedule(warmup_steps=100), total=math.inf, full=(parameters(), 0.1))


@pytest.mark.parametrize(("family", "hidden", "rate"), [("llama", 64, 0.1), ("gpt2", 96, 0.1), ("llama", 576, 0.1 / 6)])
def test_the_rate_of_full_modules_falls_with_the_width(family, hidden, rate):
    model = build_model(family)
    setattr(model.config, {"llama": "hidden_size", "gpt2": "n_embd"}[family], hidden)
    assert model.config.hidden_size == hidden
    assert rate_of_full_modules(0.1, model.config) == pytest.approx(rate)


def test_a_policy_trains_full_modules_at_the_rate_that_follows(model):
    assert build_policy(model, lr_full=None, lr_lora=0.03).rates == {"full": 0.03, "lora": 0.03}


def test_what_an_optimizer_keeps_is_measured():
    adam, momentum = torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)
    for given, (state, step) in {adam: (8, 4), partial(adam, fused=True): (8, 0), momentum: (4, 4)}.items():
        assert optimizer_bytes(given) == OptimizerBytes(state, step)
    with pytest.raises(ConfigError, match=r"memory of model\.optimizer cannot be measured"):
        optimizer_bytes(torch.optim.LBFGS)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    eight = optimizer_bytes(bitsandbytes.optim.AdamW8bit)
    assert 2 <= eight.state < 2.1 and eight.step == 0

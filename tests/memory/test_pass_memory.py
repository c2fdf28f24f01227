"""What is traced with one and two layers, against what the formulas say and against tracing all layers."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_memory import Case
from tiny_models import FAMILIES, build_model

from hybrid_lightning.engine import default_token_budget
from hybrid_lightning.memory import RunSettings, SingleDevice, plan_memory
from hybrid_lightning.memory.fake_model import FakeModel
from hybrid_lightning.memory.pass_memory import Traces, _trace_update, passes_of_step

SETTINGS = Case(prompts=4, samples=4).settings()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(family):
    settings = RunSettings(build_model(family).config, 5, 6, 4, 4)
    methods = plan_memory(settings, SingleDevice())
    assert [method.method for method in methods] == ["FFT", "LoRA", "hybrid 10%"]
    updating = [method.peaks["updating"] for method in methods]
    assert all(parts.activations > 0 for parts in updating) and all(method.largest_components.logits > 0 for method in methods)
    fft, lora, hybrid = (method.largest_components for method in methods)
    assert fft.optimizer > hybrid.optimizer > lora.optimizer > 0


@pytest.mark.parametrize("share", [0.0, None])
def test_two_layers_tell_what_all_hold(share):
    settings = replace(SETTINGS, config=copy.deepcopy(SETTINGS.config))
    settings.config.num_hidden_layers = 4
    (rows,) = passes_of_step(settings, 4)
    direct, found = _trace_update(FakeModel(settings, 4, share), rows), Traces(settings).update(rows, share)
    assert found.activations == pytest.approx(direct.activations, rel=0.01)
    assert found.logits == pytest.approx(direct.logits, rel=0.01)


def test_keys_and_values_are_counted_as_they_lie():
    """4 layers, 4 heads of 32 numbers; each prompt once, and 20 places for each of its completions; keys and values, float32."""
    assert Traces(SETTINGS).decoding(5, 7, 0).cache == 4 * 4 * 32 * (5 * 6 + 5 * 7 * 20) * 2 * 4
    sixteen = replace(SETTINGS, mixed_precision=True, dtype=torch.bfloat16, on_cpu=False)
    assert Traces(sixteen).decoding(5, 7, 0).cache == 4 * 4 * 32 * (5 * 6 + 5 * 7 * 20) * 2 * 2
    assert Traces(replace(SETTINGS, completion_tokens=1)).decoding(5, 7, 0).cache == 4 * 4 * 32 * 5 * 6 * 2 * 4


def test_a_part_of_the_tokens_keeps_a_part_of_the_activations():
    rows = passes_of_step(SETTINGS, 4)[0]
    whole, half = Traces(SETTINGS).update(rows, 0.0), Traces(SETTINGS).update(rows.rows(slice(0, 8)), 0.0)
    assert 0.45 < half.activations / whole.activations < 0.6
    recomputed = Traces(replace(SETTINGS, gradient_checkpointing=True)).update(rows, 0.0)
    assert recomputed.activations < 0.5 * whole.activations
    hybrid = Traces(SETTINGS).update(rows, 0.5)
    full = Traces(SETTINGS).update(rows, 1.0)
    assert hybrid.activations == pytest.approx((whole.activations + full.activations) / 2)


def test_passes_are_cut_as_in_training():
    settings = replace(SETTINGS, micro_batches=2, max_tokens_per_micro_batch=100)
    passes = passes_of_step(settings, 4)
    assert [len(rows) for rows in passes] == [4, 4] and len(passes_of_step(replace(settings, micro_batches=1), 4)) == 4
    model = build_model("llama")
    assert RunSettings(model.config, 1, 1).tokens_of_pass() == default_token_budget(model, torch.device("cpu"))


def test_an_entropy_bonus_keeps_one_more_number_a_token_and_hidden_state():
    rows = passes_of_step(SETTINGS, 4)[0]
    config = copy.deepcopy(SETTINGS.config)
    config.intermediate_size = 8  # so that the most is held where logits are made, and not in the last MLP
    settings = replace(SETTINGS, config=config)
    plain, bonus = (Traces(replace(settings, entropy_gradient=asked)).update(rows, 0.0) for asked in (False, True))
    hidden = int(rows.completion_mask.sum()) * SETTINGS.text_config.hidden_size * 4
    assert bonus.activations + bonus.logits - plain.activations - plain.logits == pytest.approx(hidden, rel=0.2)

"""What is traced with one and two layers, against what the formulas say and against tracing all layers."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_memory import Case
from tiny_models import FAMILIES, build_model
from transformers import GptOssConfig

from hybrid_lightning.adapters import ModuleBudget
from hybrid_lightning.engine import default_token_budget
from hybrid_lightning.errors import ModelError
from hybrid_lightning.memory import RunSettings, SingleDevice
from hybrid_lightning.memory.fake_model import FakeModel
from hybrid_lightning.memory.pass_memory import Traces, _trace_update, passes_of_step
from hybrid_lightning.memory.peaks import plan_method

SETTINGS = replace(Case().settings(), prompts_per_rollout=4)


@pytest.mark.parametrize(("family", "share"), [*zip(FAMILIES, (0.0, 0.5, 0.0, 0.0, 1.0), strict=True)])
def test_every_family_is_planned(family, share):
    settings = RunSettings(build_model(family).config, 5, 6, 4, 4, budget=ModuleBudget(share))
    found = plan_method(settings, SingleDevice()).largest_components
    assert found.activations > 0 and found.logits > 0 and found.cache > 0


def test_attention_that_cannot_be_packed_cannot_be_planned():
    with pytest.raises(ModelError, match="the memory of a 'gpt_oss' model cannot be planned: its attention takes s_aux"):
        FakeModel(RunSettings(GptOssConfig(num_hidden_layers=2), 5, 6), 1, 0)


@pytest.mark.parametrize("share", [0.0, None])
def test_two_layers_tell_what_all_hold(share):
    settings = replace(SETTINGS, config=copy.deepcopy(SETTINGS.config))
    settings.config.num_hidden_layers = 4
    (rows,) = passes_of_step(settings, 4)
    direct, found = _trace_update(FakeModel(settings, 4, share), rows), Traces(settings).update(rows, share)
    assert found.activations == pytest.approx(direct.activations, rel=0.01)
    assert found.logits == pytest.approx(direct.logits, rel=0.01)


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

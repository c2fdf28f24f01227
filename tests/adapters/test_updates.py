"""Sums of optimizer steps that are not taken, and the scores of what they would change."""

import copy

import pytest
import torch
from torch import nn

from hybrid_lightning.adapters import Scoring, UpdateTail, find_candidates
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.adapters.updates import OptimizerSteps, turns_of, updates_in_turns
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError
from hybrid_lightning.stopping import RunStopped

RANK = 2
RATE = 3e-3


def adam(stand_ins):
    return torch.optim.AdamW(stand_ins, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)


def steps_of(most=10**9, make=adam):
    return OptimizerSteps(make, most)


class Losses:
    """Losses of which some belong to one step."""

    factor = 1

    def __init__(self, model, batches, **more):
        self.model, self.batches, self.passes = model, batches, 0
        vars(self).update(more)

    def __iter__(self):
        self.passes += 1
        for tokens in self.batches:
            yield self.factor * self.model(tokens, labels=tokens).loss


def scored(model, losses, scorer=None, steps=None, process=None):
    scorer = scorer or UpdateTail(tail_rank=1)
    return Scoring(model, find_candidates(model), losses, scorer, RANK, steps=steps or steps_of(5000)).run(process)


def all_updates(model, losses, steps):
    found = {}
    for turn in updates_in_turns(model, find_candidates(model), losses, steps, ScoringProcess()):
        found |= {name: update.matrix().clone() for name, update in turn.items()}
    return found


def test_an_update_is_the_sum_of_adams_steps_at_the_start(make_model, batches):
    """Of copies of the weights, in float64, by gradients that autograd gives at the start for each step."""
    model = make_model("llama")
    found = all_updates(model, Losses(model, batches), steps_of())
    modules = find_candidates(model)
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    moved = [nn.Parameter(torch.zeros_like(weight, dtype=torch.float64)) for weight in weights]
    optimizer = adam(moved)
    for tokens in batches:
        for weight, gradient in zip(moved, torch.autograd.grad(model(tokens, labels=tokens).loss, weights), strict=True):
            weight.grad = gradient.double()
        optimizer.step()
    for name, expected in zip(modules, moved, strict=True):
        torch.testing.assert_close(found[name].double(), expected.detach(), rtol=1e-3, atol=1e-3 * RATE)


def test_losses_of_one_step_are_added_up(make_model, batches):
    model = make_model("qwen2")
    each = all_updates(model, Losses(model, batches[:4], step_ends=(2, 4)), steps_of())
    apart = all_updates(model, Losses(model, batches[:4]), steps_of())
    pairs = batches[:4].view(2, 6, -1)  # whose mean is half the sum of their losses
    together = all_updates(model, Losses(model, pairs, factor=2), steps_of())
    for name, update in each.items():
        torch.testing.assert_close(update, together[name], rtol=1e-3, atol=1e-3 * RATE)
    assert any((update - apart[name]).abs().max() > 0.1 * RATE for name, update in each.items())


def test_turns_hold_no_more_weights_than_they_may_and_change_nothing(make_model, batches):
    """That no two are in memory together is measured in `memory/test_against_runs.py`."""
    model = make_model("llama")
    candidates = find_candidates(model)
    sizes = [module.weight.numel() for module in candidates.values()]
    whole = all_updates(model, Losses(model, batches), steps_of())
    for most in (1, 2 * max(sizes), sum(sizes) // 2):
        held, losses = [], Losses(model, batches)

        def make(stand_ins, held=held):
            held.append(sum(stand_in.numel() for stand_in in stand_ins))
            return adam(stand_ins)

        found = all_updates(model, losses, steps_of(most, make))
        assert all(torch.equal(found[name], whole[name]) for name in candidates) and found.keys() == whole.keys()
        assert max(held) <= max(most, *sizes) and sum(held) == sum(sizes) and losses.passes == len(held)
        assert [name for turn in turns_of(candidates, most) for name in turn] == list(candidates)


def test_the_score_is_the_tail_of_the_update_and_nothing_is_changed(make_model, batches):
    model = make_model("llama").train()
    model.lm_head.weight.requires_grad_(True).grad = torch.ones_like(model.lm_head.weight)
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    updates = all_updates(model, Losses(model, batches), steps_of())
    for per_parameter in (False, True):
        scores = scored(model, Losses(model, batches), UpdateTail(tail_rank=3, per_parameter=per_parameter), steps_of(20_000))
        for name, update in updates.items():
            tail = float(torch.linalg.svdvals(update.double())[3:].square().sum())
            assert scores[name] == pytest.approx(tail / (update.numel() if per_parameter else 1), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), random)
    for parameter, (flag, gradient) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad == flag and parameter.grad is gradient


def test_stopped_scoring_goes_on_with_the_turns_that_are_left(make_model, batches, tmp_path):
    model = make_model("llama")
    candidates = find_candidates(model)

    def stop(seen):
        if seen == 2 * len(batches) + 3:
            raise RunStopped(15)

    with pytest.raises(RunStopped):
        scored(model, Losses(model, batches), process=ScoringProcess(ScoringProgress(tmp_path / "scoring"), stop))
    again = ScoringProgress(tmp_path / "again", tmp_path / "scoring")
    assert 0 < len(again.scores) < len(candidates)
    losses = Losses(model, batches)
    assert scored(model, losses, process=ScoringProcess(again)) == scored(model, Losses(model, batches))
    assert losses.passes < len(turns_of(candidates, 5000))


def test_a_module_that_no_loss_uses_scores_nothing():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    class OfTheFirst:
        def __iter__(self):
            yield model.layers[0](torch.ones(2, 4)).square().mean()

    found = scored(model, OfTheFirst(), UpdateTail(1, 0), steps_of())
    assert found["layers.0"] > 0 == found["layers.1"]
    # With a turn each: in that of the second module the loss needs no gradient.
    assert scored(model, OfTheFirst(), UpdateTail(1, 0), steps_of(1)) == pytest.approx(found)


def test_what_cannot_be_scored_says_why(make_model, batches):
    model = make_model("llama")
    candidates = find_candidates(model)
    losses, sgd = Losses(model, batches), torch.optim.SGD
    still, wild = (steps_of(make=lambda stand_ins, lr=lr: sgd(stand_ins, lr=lr)) for lr in (0.0, float("inf")))
    for call, error, message in (
        (lambda: UpdateTail(steps=0), ConfigError, "steps=0"),
        (lambda: UpdateTail(tail_rank=-1), ConfigError, "tail_rank=-1"),
        (lambda: Scoring(model, candidates, losses, UpdateTail(), RANK), ConfigError, "UpdateTail needs steps, the optimizer"),
        (lambda: scored(model, losses, steps=still), CalibrationError, r"move none of 14 candidate.*positive model\.lr_full"),
        (lambda: scored(model, losses, steps=wild), CalibrationError, r"the update of model\.layers\.0.* is not finite"),
        (lambda: scored(model, iter(losses)), CalibrationError, "can be iterated over only once"),
    ):
        with pytest.raises(error, match=message):
            call()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="score the model before it is quantized"):
        scored(model, losses)

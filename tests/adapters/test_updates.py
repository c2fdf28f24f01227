"""Sums of optimizer steps that are not taken, and the scores of what they would change."""

import copy
import gc

import pytest
import torch
from torch import nn

from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.scorers import Scorer, UpdateTail
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.adapters.updates import OptimizerSteps, turns_of, updates_in_turns
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError
from hybrid_lightning.stopping import RunStopped

RANK = 2
RATE, BETAS, EPS = 3e-3, (0.9, 0.99), 1e-8


def adam(stand_ins):
    return torch.optim.AdamW(stand_ins, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)


def steps_of(most=10**9, make=adam):
    return OptimizerSteps(make, most)


class Losses:
    """Losses of which some belong to one step."""

    def __init__(self, model, batches, step_ends=None):
        self.model, self.batches, self.passes = model, batches, 0
        if step_ends is not None:
            self.step_ends = step_ends

    def __iter__(self):
        self.passes += 1
        for tokens in self.batches:
            yield self.model(tokens, labels=tokens).loss


def all_updates(model, losses, steps):
    found = {}
    for turn in updates_in_turns(model, find_candidates(model), losses, steps, ScoringProcess()):
        found |= {name: update.matrix().clone() for name, update in turn.items()}
    return found


def test_an_update_is_the_sum_of_adams_steps_at_the_start(make_model, batches):
    """By Adam's formulas (Kingma and Ba 2015) in float64, from gradients that autograd gives for each step."""
    model = make_model("llama")
    found = all_updates(model, Losses(model, batches), steps_of())
    modules = find_candidates(model)
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    sums = {name: 0.0 for name in modules}
    first, second = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)
    for step, tokens in enumerate(batches, 1):
        gradients = torch.autograd.grad(model(tokens, labels=tokens).loss, weights)
        for name, gradient in zip(modules, gradients, strict=True):
            gradient = gradient.double()
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            root = (second[name] / (1 - BETAS[1] ** step)).sqrt()
            sums[name] = sums[name] - RATE * first[name] / (1 - BETAS[0] ** step) / (root + EPS)
    for name, expected in sums.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-3 * RATE)


def test_losses_of_one_step_are_added_up(make_model, batches):
    model = make_model("qwen2")
    each = all_updates(model, Losses(model, batches[:4], step_ends=(2, 4)), steps_of())

    class Pairs(Losses):
        def __iter__(self):
            for pair in self.batches.view(2, 2, *self.batches.shape[1:]):
                yield sum(self.model(tokens, labels=tokens).loss for tokens in pair)

    together = all_updates(model, Pairs(model, batches[:4]), steps_of())
    apart = all_updates(model, Losses(model, batches[:4]), steps_of())
    for name, update in each.items():
        torch.testing.assert_close(update, together[name], rtol=1e-3, atol=1e-3 * RATE)
    assert any((update - apart[name]).abs().max() > 0.1 * RATE for name, update in each.items())


def test_turns_hold_no_more_weights_than_they_may_and_change_nothing(make_model, batches):
    model = make_model("llama")
    candidates = find_candidates(model)
    sizes = {name: module.weight.numel() for name, module in candidates.items()}
    whole = all_updates(model, Losses(model, batches), steps_of())
    for most in (1, 2 * max(sizes.values()), sum(sizes.values()) // 2):
        held = []

        def make(stand_ins, held=held):
            held.append(sum(stand_in.numel() for stand_in in stand_ins))
            return adam(stand_ins)

        losses = Losses(model, batches)
        found = all_updates(model, losses, steps_of(most, make))
        assert all(torch.equal(found[name], whole[name]) for name in candidates) and found.keys() == whole.keys()
        assert max(held) <= max(most, max(sizes.values())) and sum(held) == sum(sizes.values())
        turns = turns_of(candidates, most)
        assert losses.passes == len(held) == len(turns) and [name for turn in turns for name in turn] == list(candidates)


def test_no_two_turns_are_in_memory_together(make_model, batches):
    model = make_model("llama")
    candidates = find_candidates(model)
    shapes = {tuple(module.weight.shape) for module in candidates.values()}
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    turns = []

    def make(stand_ins):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and tuple(thing.shape) in shapes]
        held = {tensor.data_ptr() for tensor in tensors} - weights
        turns.append(len(held - {place for each in stand_ins for place in (each.data_ptr(), each.grad.data_ptr())} - before))
        return adam(stand_ins)

    before = {thing.data_ptr() for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.numel()}
    scorer = UpdateTail(tail_rank=1)
    Scoring(model, candidates, Losses(model, batches), scorer, RANK, steps=steps_of(5000, make)).run()
    assert turns == [0] * len(turns_of(candidates, 5000)), "matrices of turns before"


def test_nothing_is_changed_by_scoring(make_model, batches):
    model = make_model("llama")
    model.train()
    parameters = dict(model.named_parameters())
    first = next(iter(parameters.values()))
    first.requires_grad_(False)
    next(reversed(parameters.values())).grad = torch.ones_like(next(reversed(parameters.values())))
    before = copy.deepcopy(model.state_dict()), [(p.requires_grad, p.grad) for p in model.parameters()], torch.get_rng_state()
    scores = Scoring(
        model, find_candidates(model), Losses(model, batches), UpdateTail(tail_rank=1), RANK, steps=steps_of(5000)
    ).run()
    assert len(set(scores.values())) == len(scores) and min(scores.values()) > 0
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), before[2])
    for parameter, (flag, gradient) in zip(model.parameters(), before[1], strict=True):
        assert parameter.requires_grad == flag and parameter.grad is gradient


def test_the_score_is_the_tail_of_the_update(make_model, batches):
    model = make_model("llama")
    candidates = find_candidates(model)
    updates = all_updates(model, Losses(model, batches), steps_of())
    for per_parameter in (False, True):
        scorer = UpdateTail(tail_rank=3, per_parameter=per_parameter)
        scores = Scoring(model, candidates, Losses(model, batches), scorer, RANK, steps=steps_of(20_000)).run()
        for name, update in updates.items():
            tail = float(torch.linalg.svdvals(update.double())[3:].square().sum())
            assert scores[name] == pytest.approx(tail / (update.numel() if per_parameter else 1), rel=1e-6)


def test_a_scorer_may_need_gradients_as_well(make_model, batches):
    class Both(Scorer):
        needs_update = True
        steps = 6

        def score(self, statistics, rank):
            return float((statistics.gradient.matrix() * statistics.update.matrix()).sum())

    model = make_model("llama")
    scores = Scoring(model, find_candidates(model), Losses(model, batches), Both(), RANK, steps=steps_of(20_000)).run()
    assert max(scores.values()) < 0, "steps go against the gradient"


def test_stopped_scoring_goes_on_with_the_turns_that_are_left(make_model, batches, tmp_path):
    model = make_model("llama")
    candidates = find_candidates(model)
    scorer, steps = UpdateTail(tail_rank=1), steps_of(5000)
    whole = Scoring(model, candidates, Losses(model, batches), scorer, RANK, steps=steps).run()

    def stop(seen):
        if seen == 2 * len(batches) + 3:
            raise RunStopped(15)

    with pytest.raises(RunStopped):
        kept = ScoringProgress(tmp_path / "scoring")
        Scoring(model, candidates, Losses(model, batches), scorer, RANK, steps=steps).run(ScoringProcess(kept, stop))
    again = ScoringProgress(tmp_path / "again", tmp_path / "scoring")
    assert 0 < len(again.scores) < len(candidates)
    losses = Losses(model, batches)
    assert Scoring(model, candidates, losses, scorer, RANK, steps=steps).run(ScoringProcess(again)) == whole
    assert losses.passes < len(turns_of(candidates, 5000))


def test_a_module_that_no_loss_uses_scores_nothing():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def loss(self):
            return self.layers[0](torch.ones(2, 4)).square().mean()

    model = Two()
    candidates = {f"layers.{n}": layer for n, layer in enumerate(model.layers)}
    found = Scoring(model, candidates, [model.loss()], UpdateTail(1, 0), 1, steps=steps_of()).run()
    assert found["layers.0"] > 0 == found["layers.1"]
    losses = iter([model.loss(), model.loss()])  # a turn each, in which the second module's loss needs no gradient

    class Each:
        def __iter__(self):
            yield next(losses)

    assert Scoring(model, candidates, Each(), UpdateTail(1, 0), 1, steps=steps_of(1)).run() == pytest.approx(found)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"tail_rank": -1}])
def test_impossible_settings_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=f"{name}="):
        UpdateTail(**arguments)


def test_what_cannot_be_scored_says_why(make_model, batches):
    model = make_model("llama")
    candidates = find_candidates(model)
    with pytest.raises(ConfigError, match="UpdateTail needs steps, the optimizer"):
        Scoring(model, candidates, Losses(model, batches), UpdateTail(), RANK).run()
    still = steps_of(make=lambda stand_ins: torch.optim.SGD(stand_ins, lr=0.0))
    with pytest.raises(CalibrationError, match=r"would move none of 14 candidate modules.*positive model\.lr_full"):
        Scoring(model, candidates, Losses(model, batches), UpdateTail(tail_rank=0), RANK, steps=still).run()
    wild = steps_of(make=lambda stand_ins: torch.optim.SGD(stand_ins, lr=float("inf")))
    with pytest.raises(CalibrationError, match=r"the update of model\.layers\.0.* is not finite"):
        Scoring(model, candidates, Losses(model, batches), UpdateTail(), RANK, steps=wild).run()
    once = iter(Losses(model, batches))
    with pytest.raises(CalibrationError, match="can be iterated over only once"):
        Scoring(model, candidates, once, UpdateTail(tail_rank=0), RANK, steps=steps_of(5000)).run()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="score the model before it is quantized"):
        list(updates_in_turns(model, candidates, Losses(model, batches), steps_of(), ScoringProcess()))

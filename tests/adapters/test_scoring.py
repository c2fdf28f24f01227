import contextlib
import copy
import threading

import pytest
import torch
from torch import nn

from hybrid_lightning.adapters import ExactGradients, Scoring, SketchedGradients, find_candidates, scorers
from hybrid_lightning.errors import CalibrationError, ConfigError

RANK = 2
SKETCHES = SketchedGradients(size=7)  # of 12 directions, where rank 2 and 32 x 48 weights leave a real tail


def scored(model, losses, scorer=None, gradients=None, rank=RANK):
    return Scoring(model, find_candidates(model), losses, scorer or scorers.TailEnergy(), rank, gradients).run()


def full_gradients(model: nn.Module, losses) -> dict[str, torch.Tensor]:
    """Mean over the losses by plain autograd: the independent way to the same numbers, in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    weights = {name: module.weight for name, module in find_candidates(model).items()}
    each = [torch.autograd.grad(loss, list(weights.values())) for loss in losses(model)]
    return {name: torch.stack(of_module).mean(0) for name, of_module in zip(weights, zip(*each, strict=True), strict=True)}


def tail(matrix: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[RANK:].square().sum())


def factored(squares: torch.Tensor) -> torch.Tensor:
    """The matrix of rank one with the same means of rows and columns."""
    return squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()


class LargestRow(scorers.Scorer):
    """A scorer of a user's own, which need not be safe on several threads: `concurrent` is False."""

    def score(self, statistics, rank):
        assert threading.current_thread() is threading.main_thread()
        return float(statistics.gradient.matrix().abs().sum(1).max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_against_full_gradients(make_model, losses, family):
    model = make_model(family)
    gradients = full_gradients(model, losses)
    expected = {
        scorers.TailEnergy: {name: tail(g) for name, g in gradients.items()},
        scorers.TailFraction: {name: tail(g) / float(g.square().sum()) for name, g in gradients.items()},
        scorers.PreconditionedTail: {name: tail(g / factored(g.square()).sqrt()) for name, g in gradients.items()},
        scorers.GradientNorm: {name: float(g.norm()) for name, g in gradients.items()},
        LargestRow: {name: float(g.abs().sum(1).max()) for name, g in gradients.items()},
    }
    for scorer, values in expected.items():
        scores = scored(model, losses(model), scorer())
        assert list(scores) == list(values)
        assert scores == {name: pytest.approx(value, rel=2e-3, abs=1e-6) for name, value in values.items()}, scorer
    one = (sum(losses(model)) / 6 for _ in range(1))  # it does not matter how rollouts are cut into losses
    together = scored(model, one, scorers.PreconditionedTail())
    assert together == {name: pytest.approx(value, rel=2e-3) for name, value in expected[scorers.PreconditionedTail].items()}


def test_a_module_is_scored_at_its_own_rank(make_model, losses):
    model = make_model("llama")
    found = {rank: scored(model, losses(model), rank=rank) for rank in (1, 4)}
    ranks = {name: (1, 4, 0)[place % 3] for place, name in enumerate(found[1])}
    mixed = scored(model, losses(model), rank=ranks)
    for name, rank in ranks.items():
        assert mixed[name] == found[rank][name] if rank else mixed[name] > found[1][name]
    for none in (0, dict.fromkeys(ranks, 0)):
        with pytest.raises(ConfigError, match="rank=0 leaves nothing to score; give a LoRA rank of at least 1"):
            scored(model, losses(model), rank=none)


def test_the_model_is_as_before(make_model, losses):
    model = make_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def state():
        weights = [(p.requires_grad, id(p.grad), bool(p._post_accumulate_grad_hooks)) for p in model.parameters()]
        return weights, [module.training for module in model.modules()]

    def failing():
        yield next(losses(model))
        assert not model.training and not model.lm_head.weight.requires_grad
        raise KeyError("calibration data ended")

    before = state()
    for stream, raised in ((losses(model), False), (failing(), True)):
        with pytest.raises(KeyError) if raised else contextlib.nullcontext():
            scored(model, stream)
        assert state() == before


def test_autocast_around_the_losses_does_not_reach_the_sums_nor_does_no_grad_around_all(make_model, batches):
    model = make_model("llama")

    def computed(inside):
        for tokens in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, labels=tokens).loss
                if inside:
                    yield loss
            if not inside:
                yield loss

    with torch.no_grad():
        assert scored(model, computed(True), gradients=SKETCHES) == scored(model, computed(False), gradients=SKETCHES)


def test_gradients_of_16_bits_are_added_up_in_float32():
    total = ExactGradients().new_sum("a", torch.empty(1, 1, dtype=torch.bfloat16), 1)
    for value in (1.0, *[2**-9] * 511):  # in bfloat16 1 + 2^-9 is 1
        total.add(torch.full((1, 1), value, dtype=torch.bfloat16))
    torch.testing.assert_close(total.mean(512).matrix(), torch.full((1, 1), (1 + 511 / 512) / 512))


def test_gradient_checkpointing_gives_the_same_scores_and_does_not_wake_dropout(make_model, losses):
    """GPT-2's config has dropout 0.1 everywhere; only the blocks that recompute may be in train mode."""
    model = make_model("gpt2")
    plain = scored(model, losses(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    handle = model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    saved = scored(model, losses(model))
    handle.remove()
    assert saved == {name: pytest.approx(score, rel=1e-4) for name, score in plain.items()}
    assert len(calls) == 2 * 6  # each of the six losses recomputed the block
    assert modes == [module.training for module in model.modules()]


def test_a_scale_keeps_gradients_that_float16_has_no_numbers_for(make_model, losses):
    exact, half = make_model("llama"), make_model("llama").half()
    expected = scored(exact, (1e-8 * loss for loss in losses(exact)))

    def in_half(scale):
        small = (1e-8 * loss for loss in losses(half))
        return Scoring(half, find_candidates(half), small, scorers.TailEnergy(), RANK, loss_scale=scale).run()

    assert in_half(2.0**12) == {name: pytest.approx(score, rel=0.1) for name, score in expected.items()}
    with pytest.raises(CalibrationError, match="gradient is zero in all"):
        in_half(1.0)


def test_random_depends_on_seed_and_name_only():
    named = [scorers.ModuleStatistics(name, torch.ones(3, 3), 9) for name in ("a", "b")]
    scores = [scorers.Random(seed).score(module, 1) for seed in (0, 1) for module in named]
    assert len(set(scores)) == 4 and all(0 <= score < 1 for score in scores)
    assert scorers.Random(0).score(named[0], 5) == scores[0]


# ---- refused, or scored zero with a warning


class Blocks(nn.Module):
    """Three blocks; the loss uses only two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def loss(self) -> torch.Tensor:
        return self.layers[1](self.layers[0](torch.ones(2, 4))).square().mean()


def test_an_unused_module_scores_zero_with_a_warning():
    model = Blocks()
    with pytest.warns(UserWarning, match=r"1 of 3 candidate modules got no gradient .*layers\.2"):
        scores = scored(model, [model.loss()], scorers.GradientNorm())
    assert scores["layers.2"] == 0 and min(scores["layers.0"], scores["layers.1"]) > 0


def test_a_scorer_of_ones_own_gives_finite_numbers(monkeypatch):
    model = Blocks()
    monkeypatch.setattr(LargestRow, "score", lambda *_: float("nan"))
    with pytest.raises(CalibrationError, match=r"LargestRow gave layers\.0 the score nan"):
        Scoring(model, {"layers.0": model.layers[0]}, [model.loss()], LargestRow(), 1).run()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda model: (0.0 * model.loss() for _ in range(2)), "zero in all 3 candidate modules"),
        (lambda model: [], "zero in all 3 candidate modules"),
        (lambda model: (model.loss() * factor for factor in (1.0, float("nan"))), "loss 1 is nan"),
        (lambda model: [model.layers[0](torch.zeros(1, 4)).mul(0).sum().sqrt()], r"layers\.0 is not finite"),
    ],
)
def test_losses_without_a_signal_are_refused(losses, message):
    model = Blocks()
    with pytest.raises(CalibrationError, match=message):
        scored(model, losses(model))

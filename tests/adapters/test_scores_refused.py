"""What cannot be scored is refused, or scored zero with a warning."""

import pytest
import torch
from torch import nn

from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.scorers import (
    GradientNorm,
    SpectrumSNR,
    TailEnergy,
    WeightGradient,
)
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.adapters.sketch import SketchedGradients
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError

RANK = 2


class Blocks(nn.Module):
    """Three blocks of which only two are used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def loss(self) -> torch.Tensor:
        return self.layers[1](self.layers[0](torch.ones(2, 4))).square().mean()


def test_an_unused_module_scores_zero_with_a_warning():
    model = Blocks()
    with pytest.warns(UserWarning, match=r"1 of 3 candidate modules got no gradient .*layers\.2"):
        scores = Scoring(model, find_candidates(model), [model.loss()], GradientNorm(), 1).run()
    assert scores["layers.2"] == 0 and min(scores["layers.0"], scores["layers.1"]) > 0


class Own(TailEnergy):
    def __init__(self, value):
        self.value = value

    def score(self, statistics, rank):
        return self.value


@pytest.mark.parametrize(("value", "error"), [("high", ConfigError), (None, ConfigError), (float("nan"), CalibrationError)])
def test_a_scorer_of_ones_own_gives_numbers(value, error):
    model = Blocks()
    with pytest.raises(error, match=r"Own(\.score returned .* for layers\.0; return a number| gave layers\.0 the score nan)"):
        Scoring(model, {"layers.0": model.layers[0]}, [model.loss()], Own(value), 1).run()


def test_no_signal_is_an_error():
    model = Blocks()
    candidates = find_candidates(model)

    def score(losses, scorer=None):
        return Scoring(model, candidates, losses, scorer or TailEnergy(), 1).run()

    with pytest.raises(CalibrationError, match="zero in all 3 candidate modules"):
        score(0.0 * model.loss() for _ in range(2))
    with pytest.raises(CalibrationError, match="no calibration losses"):
        score([])
    with pytest.raises(CalibrationError, match="loss 1 is nan"):
        score(model.loss() * factor for factor in (1.0, float("nan")))
    with pytest.raises(CalibrationError, match=r"gradient of layers\.0 is not finite"):
        score(model.layers[0](torch.zeros(1, 4)).mul(0).sum().sqrt() for _ in range(1))
    with pytest.raises(CalibrationError, match="loss 0 does not depend"):
        score([torch.ones(())])
    with pytest.raises(ConfigError, match=r"loss 0 has shape \(4, 4\)"):
        score([model.layers[0].weight * 2])
    with pytest.raises(CalibrationError, match="only one loss"):
        score((model.loss() for _ in range(1)), SpectrumSNR())
    with pytest.raises(ConfigError, match="rank=0"):
        Scoring(model, candidates, [], TailEnergy(), 0).run()


def test_a_quantized_model_is_refused():
    model = Blocks()
    model.layers[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.0 is torch\.uint8; score the model before"):
        Scoring(model, find_candidates(model), [], TailEnergy(), 1).run()


def test_sketches_refuse_scorers_that_need_all_entries(make_model, losses):
    model = make_model("llama")
    with pytest.raises(ConfigError, match="score with ExactGradients"):
        Scoring(model, find_candidates(model), losses(model), WeightGradient(), RANK, SketchedGradients(size=7)).run()

"""The clip ranges that the constructors take."""

import math
import warnings

import pytest
from jsonargparse import ArgumentParser
from scalar_reference import CLIPPED, make_inputs

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import CISPOLoss, DAPOLoss, GSPOLoss, GSPOTokenLoss, PolicyLoss, SAPOLoss

SEQUENCE_RATIOS = [GSPOLoss, GSPOTokenLoss]
TOKEN_RATIOS = [cls for cls in CLIPPED if cls not in SEQUENCE_RATIOS]


def test_one_ratio_a_sequence_moves_all_its_tokens_alike():
    inputs = make_inputs()
    inputs.logprobs.grad = None
    GSPOLoss(0.09, 0.09)(inputs).loss.backward()
    for row, mask in zip(inputs.logprobs.grad, inputs.completion_mask, strict=True):
        assert row[mask].unique().numel() == 1 and (row[~mask] == 0).all()


@pytest.mark.parametrize("cls", CLIPPED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, r"clip_low=-0.1 must be at least 0"),
        ({"clip_low": 1.0}, r"clip_low=1.0 must be .* below 1"),
        ({"clip_low": math.nan}, r"clip_low=nan"),
        ({"clip_high": -0.1}, r"clip_high=-0.1"),
        ({"clip_high": math.inf}, r"clip_high=inf"),
        ({"clip_high": math.nan}, r"clip_high=nan"),
        ({"dual_clip": 1.0}, r"dual_clip=1.0 must be .* above 1 \+ clip_high"),
        ({"dual_clip": math.nan}, r"dual_clip=nan"),
    ],
)
def test_values_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        cls(**options)
    assert cls.__name__ in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.1, 0.1), (3e-4, 0.28), (0.2, 4e-4)])
@pytest.mark.parametrize("cls", SEQUENCE_RATIOS)
def test_losses_over_ratios_of_sequences_refuse_a_clip_range_of_grpo(cls, clips):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: .*set clip_low=3e-4 and clip_high=4e-4"):
        cls(*clips)


@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.0, 0.2), (0.2, 5e-3)])
@pytest.mark.parametrize("cls", TOKEN_RATIOS)
def test_losses_over_ratios_of_tokens_refuse_a_clip_range_of_gspo(cls, clips):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: .*set clip_low=0.2 and clip_high=0.2"):
        cls(*clips)


@pytest.mark.parametrize(("yaml", "switched"), [("GRPOLoss", "GSPOLoss"), ("GSPOLoss", "GRPOLoss")])
def test_a_class_switched_on_the_command_line_notices_the_range_of_the_yaml(yaml, switched, tmp_path):
    """The command line keeps arguments of the same name when the class changes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--loss", type=PolicyLoss)
    defaults = {"GRPOLoss": (0.2, 0.2), "GSPOLoss": (3e-4, 4e-4)}
    low, high = defaults[yaml]
    path = tmp_path / "loss.yaml"
    path.write_text(f"loss:\n  class_path: {yaml}\n  init_args: {{clip_low: {low}, clip_high: {high}}}\n")
    arguments = [f"--config={path}", f"--loss={switched}"]
    with pytest.raises(ConfigError, match=f"{switched}: .* left over from a {yaml[:4]} config"):
        parser.instantiate(parser.parse_args(arguments))
    low, high = defaults[switched]
    remedied = parser.parse_args([*arguments, f"--loss.clip_low={low}", f"--loss.clip_high={high}"])
    loss = parser.instantiate(remedied).loss
    assert type(loss).__name__ == switched and (loss.clip_low, loss.clip_high) == (low, high)


@pytest.mark.parametrize("cls", CLIPPED)
def test_defaults_are_the_papers(cls):
    loss = cls()
    clips = (3e-4, 4e-4) if cls in SEQUENCE_RATIOS else (0.2, 0.28) if cls is DAPOLoss else (0.2, 0.2)
    assert (loss.clip_low, loss.clip_high, loss.dual_clip, loss.kl_coef, loss.entropy_coef) == (*clips, None, 0.0, 0.0)


@pytest.mark.parametrize("switched", [CISPOLoss, SAPOLoss])
def test_a_loss_without_clip_range_does_not_inherit_one(switched, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--loss", type=PolicyLoss)
    path = tmp_path / "loss.yaml"
    path.write_text("loss:\n  class_path: GRPOLoss\n  init_args: {clip_low: 0.2, clip_high: 0.2, kl_coef: 0.1}\n")
    loss = parser.instantiate(parser.parse_args([f"--config={path}", f"--loss={switched.__name__}"])).loss
    plain = {name: value for name, value in vars(switched(kl_coef=0.1)).items() if name != "_init_args"}
    assert type(loss) is switched and {name: vars(loss)[name] for name in plain} == plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CISPOLoss(cap=1.0), r"CISPOLoss: cap=1.0 must be finite and above 1"),
        (lambda: CISPOLoss(cap=math.nan), r"cap=nan"),
        (lambda: SAPOLoss(tau_positive=0.0), r"SAPOLoss: tau_positive=0.0 must be finite and above 0"),
        (lambda: SAPOLoss(tau_negative=math.inf), r"tau_negative=inf"),
    ],
)
def test_settings_of_the_unclipped_losses(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_dapo_without_clip_higher_is_told_of():
    """A range of `GRPOLoss` that is left over is one that DAPO may have on purpose too, so it is no error."""
    with pytest.warns(UserWarning, match=r"clip_high=0.2 is not above clip_low=0.2, .* no clip-higher"):
        DAPOLoss(0.2, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DAPOLoss(0.2, 0.28)

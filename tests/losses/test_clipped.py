"""The clip ranges that the constructors take."""

import pytest
from jsonargparse import ArgumentParser
from scalar_reference import CLIPPED

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import (
    CISPOLoss,
    DAPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    GSPOTokenLoss,
    PolicyLoss,
    SAPOLoss,
)

SEQUENCE_RATIOS = [GSPOLoss, GSPOTokenLoss]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (GRPOLoss, {"clip_low": -0.1}, r"clip_low=-0.1 must be at least 0 and below 1"),
        (GSPOLoss, {"clip_low": 1.0}, r"clip_low=1.0 must be at least 0 and below 1"),
        (DrGRPOLoss, {"clip_high": -0.1}, r"clip_high=-0.1 must be finite and at least 0"),
        (GSPOTokenLoss, {"dual_clip": 1.0}, r"dual_clip=1.0 must be .* above 1 \+ clip_high"),
        (CISPOLoss, {"cap": 1.0}, r"cap=1.0 must be finite and above 1"),
        (SAPOLoss, {"tau_positive": 0.0}, r"tau_positive=0.0 must be finite and above 0"),
    ],
)
def test_values_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: {message}"):
        cls(**options)


@pytest.mark.parametrize("cls", CLIPPED)
def test_defaults_are_the_papers(cls):
    loss = cls()
    clips = (3e-4, 4e-4) if cls in SEQUENCE_RATIOS else (0.2, 0.28) if cls is DAPOLoss else (0.2, 0.2)
    assert (loss.clip_low, loss.clip_high, loss.dual_clip, loss.kl_coef, loss.entropy_coef) == (*clips, None, 0.0, 0.0)


@pytest.mark.parametrize("cls", CLIPPED)
def test_ratios_of_tokens_and_of_sequences_refuse_each_others_clip_range(cls):
    wrong = [(0.1, 0.1), (3e-4, 0.28)] if cls in SEQUENCE_RATIOS else [(3e-4, 4e-4), (0.2, 5e-3)]
    remedy = "set clip_low=3e-4 and clip_high=4e-4" if cls in SEQUENCE_RATIOS else "set clip_low=0.2 and clip_high=0.2"
    for clips in wrong:
        with pytest.raises(ConfigError, match=rf"{cls.__name__}: .*{remedy}"):
            cls(*clips)


@pytest.fixture
def switched(tmp_path):
    """A function: the loss of a YAML file after its class has been switched on the command line, which keeps arguments."""

    def switch(yaml, to, *arguments):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_argument("--loss", type=PolicyLoss)
        path = tmp_path / "loss.yaml"
        path.write_text(f"loss:\n  class_path: {yaml}\n")
        return parser.instantiate(parser.parse_args([f"--config={path}", f"--loss={to}", *arguments])).loss

    return switch


def test_a_class_switched_on_the_command_line_notices_the_range_of_the_yaml(switched):
    yaml = "GRPOLoss\n  init_args: {clip_low: 0.2, clip_high: 0.2}"
    with pytest.raises(ConfigError, match=r"GSPOLoss: .* left over from a GRPO config"):
        switched(yaml, "GSPOLoss")
    loss = switched(yaml, "GSPOLoss", "--loss.clip_low=3e-4", "--loss.clip_high=4e-4")
    assert type(loss) is GSPOLoss and (loss.clip_low, loss.clip_high) == (3e-4, 4e-4)


@pytest.mark.parametrize("to", [CISPOLoss, SAPOLoss])
def test_a_loss_without_clip_range_does_not_inherit_one(to, switched):
    loss = switched("GRPOLoss\n  init_args: {clip_low: 0.2, clip_high: 0.2, kl_coef: 0.1}", to.__name__)
    plain = {name: value for name, value in vars(to(kl_coef=0.1)).items() if name != "_init_args"}
    assert type(loss) is to and {name: vars(loss)[name] for name in plain} == plain

"""Values against a scalar loop, gradients against finite differences, and the ranges of the constructors."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
from jsonargparse import ArgumentParser
from scalar_reference import CLIPS, make_inputs, scalar_loss

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GRPOLoss, GSPOLoss, PolicyLoss
from hybrid_lightning.types import LossInputs

CASES = [
    {},
    {"dual_clip": 1.1},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_importance_weight": True},
    {"kl_coef": 0.3, "kl_importance_weight": True, "dual_clip": 1.1},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
def test_values_equal_a_scalar_loop(cls, options):
    inputs = make_inputs(seed=1, b=8, t=6, spread=0.3)
    output = cls(*CLIPS, **options)(inputs)
    level = cls is GSPOLoss
    want = scalar_loss(inputs, sequence_level=level, clip_low=CLIPS[0], clip_high=CLIPS[1], **options)
    assert output.loss.item() == pytest.approx(want.pop("loss"), rel=1e-12)
    assert want["clip_ratio/low_mean"] > 0 and want["clip_ratio/high_mean"] > 0 and want["ratio/max"] > 1.1
    if not options.get("kl_coef"):
        del want["kl"]
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradcheck(cls, options, seed):
    inputs = make_inputs(seed=seed, b=4, t=4, spread=0.15)
    loss = cls(*CLIPS, **options)
    ratios = loss.ratio(inputs, inputs.old_logprobs).detach()
    kinks = torch.tensor([1 - CLIPS[0], 1 + CLIPS[1], 1.1], dtype=torch.float64)
    assert (ratios[..., None] - kinks).abs().min() > 1e-4, "finite differences must not step over a kink"

    def value(logprobs):
        return loss(
            LossInputs(logprobs, inputs.advantages, inputs.completion_mask, inputs.old_logprobs, inputs.ref_logprobs, 5.0, 20.0)
        ).loss

    assert torch.autograd.gradcheck(value, inputs.logprobs)


def test_one_ratio_a_sequence_moves_all_its_tokens_alike():
    inputs = make_inputs()
    inputs.logprobs.grad = None
    GSPOLoss(0.09, 0.09)(inputs).loss.backward()
    for row, mask in zip(inputs.logprobs.grad, inputs.completion_mask, strict=True):
        assert row[mask].unique().numel() == 1 and (row[~mask] == 0).all()


@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
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
def test_gspo_refuses_a_clip_range_of_grpo(clips):
    with pytest.raises(ConfigError, match=r"GSPOLoss: .*set clip_low=3e-4 and clip_high=4e-4"):
        GSPOLoss(*clips)


@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.0, 0.2), (0.2, 5e-3)])
def test_grpo_refuses_a_clip_range_of_gspo(clips):
    with pytest.raises(ConfigError, match=r"GRPOLoss: .*set clip_low=0.2 and clip_high=0.2"):
        GRPOLoss(*clips)


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


def test_defaults_are_the_papers():
    grpo, gspo = GRPOLoss(), GSPOLoss()
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.kl_coef) == (0.2, 0.2, None, 0.0)
    assert (gspo.clip_low, gspo.clip_high, gspo.dual_clip, gspo.kl_coef) == (3e-4, 4e-4, None, 0.0)


@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
def test_losses_copy_pickle_and_describe_themselves(cls):
    loss = cls(*CLIPS, kl_coef=0.1)
    for copy in (deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert vars(copy) == vars(loss)
    assert loss.to_config()["init_args"] == {"clip_low": 0.02, "clip_high": 0.03, "kl_coef": 0.1}

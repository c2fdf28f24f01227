"""Every class that a config can name is found by its short name, and is the one of its room."""

import inspect

from lightning.pytorch.callbacks import Callback

import hybrid_lightning.cli  # noqa: F401  (what the command line has imported)
from hybrid_lightning import adapters, advantages, data, export, losses, policy, rewards, rollout
from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.cli_parser import known_classes
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.policy import LanguageModule

ROOMS = (adapters, advantages, data, export, losses, policy, rewards, rollout)
BASES = (Configurable, LanguageModule, Callback)


def public_classes():
    """Name -> class for all that rooms offer, without abstract bases."""
    for room in ROOMS:
        for name in room.__all__:
            part = getattr(room, name)
            if isinstance(part, type) and issubclass(part, BASES) and not inspect.isabstract(part):
                yield name, part


def test_each_class_is_found_by_its_short_name():
    known = {name: part for base in BASES for name, part in known_classes(base).items()}
    found = dict(public_classes())
    assert {"GSPOLoss", "MathMatch", "GSM8K", "ExactGradients", "GroupAdvantage", "MergedModel", "Sampler"} <= found.keys()
    assert not [name for name, part in found.items() if known.get(name) is not part]


def test_a_base_is_no_choice():
    assert "GroupAdvantage" in known_classes(AdvantageEstimator) and "AdvantageEstimator" not in known_classes(AdvantageEstimator)

"""Which changes are found is decided by the peaks that are planned: here by some that are made up."""

import pytest
from tiny_memory import Case, with_flags

from hybrid_lightning.memory import Components, MethodMemory, fitting
from hybrid_lightning.memory.peaks import CONTEXT_BYTES

SETTINGS = with_flags(Case(0.1, validation=0, more={"prompts_per_rollout": 64}).settings(), on_cpu=False)


def planned(settings):
    weights, share = 100.0 * settings.keep_start_weights, settings.planning.budget.share
    generating = Components(weights, cache=10.0 * settings.schedule.prompts_per_rollout)
    updating = Components(weights, activations=400.0 - 200 * settings.gradient_checkpointing, optimizer=1000 * share)
    return MethodMemory("hybrid", 0, 0, {"generating": generating, "updating": updating})


@pytest.mark.parametrize(
    ("free", "needs_reference", "changes"),
    [
        (800, False, []),
        (700, False, ["adapter.keep_start_weights=false"]),
        (700, True, ["model.prompts_per_rollout=32"]),
        (620, False, ["model.prompts_per_rollout=32"]),  # with which the start weights may stay
        (520, False, ["adapter.keep_start_weights=false", "model.prompts_per_rollout=32"]),
        (450, False, ["model.prompts_per_rollout=32", "model.gradient_checkpointing=true"]),
        (50, True, None),
    ],
)
def test_the_fewest_changes_that_cost_least(monkeypatch, free, needs_reference, changes):
    monkeypatch.setattr(fitting, "plan_method", planned)
    settings = with_flags(SETTINGS, device_bytes=CONTEXT_BYTES + free)
    found, method = fitting.find_changes(settings, needs_reference)
    options = [option.removeprefix("--") for change in found for option in change.overrides.split()]
    assert (method.peak_bytes <= free) is (changes is not None)
    if changes is None:
        assert options[-1] == "adapter.budget.share=0.0" and "adapter.keep_start_weights=false" not in options
    else:
        assert options == changes

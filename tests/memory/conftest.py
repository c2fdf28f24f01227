"""Passes are traced once for all tests of a process: each takes half a second, and few settings make another one of it."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cli_runs import write_folder
from tiny_models import build_model

from hybrid_lightning.memory import RunSettings
from hybrid_lightning.memory.pass_memory import Traced, Traces

# What a pass depends on by the sizes in its name alone, or not at all.
NOT_TRACED = {"config", "prompts_per_rollout", "samples_per_prompt", "micro_batches", "accumulate_grad_batches"}
NOT_TRACED |= {"eval_prompts", "eval_samples", "calibration_prompts", "max_tokens_per_micro_batch", "optimizer", "budget", "plan"}
NOT_TRACED |= {"scoring_copies", "scoring_steps", "sampler", "device_bytes"}
TRACED = [field.name for field in fields(RunSettings) if field.name not in NOT_TRACED]


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    known: dict[Any, Traced] = {}
    trace = Traces._by_layers

    def remembered(self: Traces, name: Any, *how: Any) -> Traced:
        settings = tuple(repr(getattr(self.settings, field)) for field in TRACED)
        key = (name, self.settings.config.to_json_string(), settings)
        if key not in known:
            known[key] = trace(self, name, *how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traces, "_by_layers", remembered)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the command line with a model of one layer, whose weights cannot be read."""
    for folder in write_folder(tmp_path_factory.mktemp("memory")):
        build_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
        (folder / "model" / "model.safetensors").write_bytes(b"no weights")
        yield folder

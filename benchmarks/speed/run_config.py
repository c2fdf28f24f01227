"""Worker: runs a config of a checkout like `python -m hybrid_lightning fit`, one rollout and its update at a time.

It serves both sides of a comparison of commits. `hybrid_lightning` and the rest of `benchmarks` come from the given checkout.
"""

import json
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from benchmarks.workloads import Settings

# In place of data that configs name and that is missing: rows of the same columns.
_WORDS = "Ann has {a} pens and gets {b} more. How many pens does she have?"
_GIVEN = {"smollm2_mawps": [{"input": _WORDS.format(a=a, b=b), "target": a + b} for a in range(2, 22) for b in range(2, 22)]}
# Nothing but rollouts and updates.
_QUIET = {
    "trainer.logger": "false",
    "trainer.limit_val_batches": "0",
    "trainer.num_sanity_val_steps": "0",
    "trainer.enable_progress_bar": "false",
    "checkpoint.monitor": "null",
    "checkpoint.save_last": "false",
}


def main(checkout: str, given: Sequence[str] = ()) -> None:
    """Train by a config of a checkout and the given options, until the parent wants no more steps."""
    sys.path.insert(0, checkout)
    from hybrid_lightning.process import prepare_process

    prepare_process()  # before torch is loaded
    import hybrid_lightning

    assert hybrid_lightning.__file__.startswith(checkout), hybrid_lightning.__file__
    from benchmarks.training import Gated
    from benchmarks.worker import Gate

    try:
        from hybrid_lightning.cli.main import HybridLightningCLI
    except ModuleNotFoundError:  # a checkout from before the room `cli`
        from hybrid_lightning.cli import HybridLightningCLI

    settings = Settings.from_arguments()
    name = settings.workload.name
    with TemporaryDirectory(prefix="run_config_") as folder:
        options = {
            **_QUIET,
            "trainer.max_steps": str(settings.rollouts * settings.workload.minibatches),
            "trainer.default_root_dir": folder,
        }
        if name in _GIVEN:
            options["data.source.train"] = rows = f"{folder}/rows.jsonl"
            with open(rows, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in _GIVEN[name])
        chosen = [*(f"--{key}={value}" for key, value in options.items()), *given]
        arguments = ["fit", f"--config={checkout}/configs/{name}.yaml", *chosen]
        HybridLightningCLI(args=arguments, trainer_defaults={"callbacks": [Gated(Gate(settings))]})

"""`python -m hybrid_lightning`."""

import logging
import signal
import sys

from hybrid_lightning.process import prepare_process
from hybrid_lightning.sharding.starter import end_with_starter
from hybrid_lightning.stopping import RunStopped, StopSignals


def run() -> None:
    """Run the command line; signals count from here on, before anything takes time."""
    signals = StopSignals(started_by_rank=end_with_starter())
    signals.take_over()
    try:
        prepare_process()  # before torch is loaded
        # Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from hybrid_lightning.cli import main

        main(signals=signals)
        signals.check()  # it came when the work was done: whoever sent it learns that it was heard
    except RunStopped as stop:
        if not stop.explained:
            sys.stderr.write(f"stopped by {signal.Signals(stop.number).name}: {signals.last_words()}\n")
        if signals.started_by_rank and stop.together:
            sys.exit()  # Lightning kills the rank that started this one, which is still saving, where this one ends with a code
        raise


if __name__ == "__main__":
    run()
